"""`python -m torch_pnn` is the same as the command `torch-pnn`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
