"""Moved: the command is `python -m recipes.cost`."""

if __name__ == "__main__":
    raise SystemExit("error: `python -m edit.cost` is `python -m recipes.cost` now, with the same words")
