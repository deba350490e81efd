"""`python -m jaxft`."""

import sys

from jaxft.cli import program

if __name__ == "__main__":
    sys.exit(program())
