"""`rlgf` and `python -m rlgf`: the command line, whose libraries take seconds to import, in which Ctrl-C is no error."""

import sys


def main() -> None:
    """Entry point."""
    try:
        from rlgf.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
