"""`python -m lorax` is the command line."""

from lorax.cli import main

if __name__ == "__main__":
    main()
