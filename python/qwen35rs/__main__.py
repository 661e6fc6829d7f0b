"""The command line's way in: of `python -m qwen35rs` and of the script `qwen35rs`."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Reads the command line's modules, and runs it.

    Reading them takes a moment, in which Ctrl-C would end in the middle of an import. Nothing is under way then that
    would have to be ended, so the process ends at once.
    """
    heeds = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # not where the caller has it ignored
    if heeds:
        signal.signal(signal.SIGINT, _end)
    from .cli import main as run

    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(signum: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:  # also where stderr is closed
        os._exit(130)


if __name__ == "__main__":
    main()
