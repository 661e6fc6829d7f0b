"""The command line's way in: of `python -m qwen35rs` and of the script `qwen35rs`."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Reads the command line's modules, and runs it.

    Modules are read when the process starts, and some once a command does. Ctrl-C meanwhile ends the process at once,
    since an exception in the middle of an import can get lost or end in a traceback; elsewhere it is KeyboardInterrupt.
    """
    # Not where the caller has it ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from .cli import main as run

    run()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    inner = frame
    while inner is not None:
        if inner.f_code.co_filename == "<frozen importlib._bootstrap>":
            try:
                os.write(2, b"interrupted\n")
            finally:  # also where stderr is closed
                os._exit(130)
        inner = inner.f_back
    signal.default_int_handler(signum, frame)


if __name__ == "__main__":
    main()
