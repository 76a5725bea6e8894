"""Moved: the command is `python -m recipes.checksums`."""

if __name__ == "__main__":
    raise SystemExit("error: `python -m edit.checksums` is `python -m recipes.checksums` now, with the same words")
