"""Moved: the command is `python -m recipes.export`."""

if __name__ == "__main__":
    raise SystemExit("error: `python -m edit.export` is `python -m recipes.export` now, with the same words")
