"""Entry point of `rlgf` and `python -m rlgf`.

Importing the libraries takes seconds; a signal during the import exits with one sentence.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def leave(number: int, frame: FrameType | None) -> None:
    """Exit with a sentence and the code of a signal."""
    with suppress(OSError):  # a terminal that hung up
        os.write(2, f"error: interrupted by {signal.Signals(number).name}, before the command began.\n".encode())
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
        leave(signal.SIGINT, None)
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
