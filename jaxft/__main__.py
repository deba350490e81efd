"""`python -m jaxft`."""

from jaxft.cli import main

if __name__ == "__main__":
    main()
