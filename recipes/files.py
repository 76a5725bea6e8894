"""Files that are whole or not there, whenever the process ends."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> Path:
    """Put content in place at once; makes the folder. Text is UTF-8, with \\u.... for what is none (names of files)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    os.replace(temporary, path)
    return path
