"""Entry point of `rlgf` and `python -m rlgf`.

Importing the libraries takes seconds; Ctrl-C during the import exits without a traceback.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from rlgf.cli.app import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
