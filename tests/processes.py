"""Processes that a test started, seen from outside (Linux)."""

import time
from pathlib import Path


def ended(pid: int, within: float) -> bool:
    """Whether a process is gone, or only waits for its parent, within so many seconds: a signal takes a moment."""
    last = time.monotonic() + within
    while time.monotonic() < last:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
