"""Moved: the command is `python -m recipes.plan`."""

if __name__ == "__main__":
    raise SystemExit("error: `python -m edit.plan` is `python -m recipes.plan` now, with the same words")
