"""Prints `version;directory` of the PyTorch that this interpreter would import, without importing it.

Run by cmake/torch.cmake. Exits with 1 and one sentence on standard error where there is none.
"""

import importlib.util
import os
import re
import sys


def main() -> int:
    """Prints what CMake needs; the exit status says whether there was anything to print."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        print(f"module torch is not installed for {sys.executable} (Python {sys.version.split()[0]})", file=sys.stderr)
        return 1
    root = os.path.dirname(spec.origin)
    try:
        with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
            match = re.search(r"^__version__ = ['\"](\d+\.\d+\.\d+)", file.read(), re.MULTILINE)
    except OSError as error:
        print(f"{root} has no readable version.py: {error}", file=sys.stderr)
        return 1
    if match is None:
        print(f"{root}/version.py names no version like 2.13.0", file=sys.stderr)
        return 1
    print(f"{match.group(1)};{root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
