"""Entry point of `rlgf` and `python -m rlgf`.

Importing the libraries takes seconds; a signal during the import exits without a traceback.
"""

import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def leave(number: int, frame: FrameType | None) -> None:
    """Exit with the code of a signal."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command line."""
    ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]  # not ignored, as under nohup
    for number in ours:
        signal.signal(number, leave)
    try:
        from rlgf.cli.app import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
