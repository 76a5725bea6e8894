"""Writes constraints.txt: the exact versions of this environment, in which the default suite has just passed."""

import os
import platform
from datetime import date
from importlib.metadata import distributions
from pathlib import Path

OURS = {"edit-dit", "pip", "setuptools", "wheel"}  # what comes with every environment, and the project itself
FILE = Path(__file__).parents[1] / "constraints.txt"


def versions() -> dict[str, str]:
    """Of everything that is installed, by name; without local parts, which no index has (2.13.0+cpu)."""
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
    return {name: found[name] for name in sorted(found) if name not in OURS}


def main() -> None:
    head = f"# With these versions the default suite last passed: {date.today()}, Python {platform.python_version()}.\n"
    head += "# `pip install -e . -c constraints.txt` brings them back. Written by `.ci/run --freeze`.\n"
    temporary = FILE.with_suffix(".tmp")
    temporary.write_text(head + "".join(f"{name}=={version}\n" for name, version in versions().items()))
    os.replace(temporary, FILE)
    print(f"{FILE.name}: {len(versions())} versions")


if __name__ == "__main__":
    main()
