"""How a program ends: with one line for what it could not do, and the status that a shell expects.

Owns: those lines and statuses, and standard streams that are closed. Does not know: what the
program does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from fomoe.errors import FomoeError


def exit_status(program: str, work: Callable[[], int]) -> int:
    """Do the work; returns its status, or 1 (a FomoeError or OSError, told in one line), 130
    (Ctrl-C), 141 (what is printed is not read).
    """
    _fill_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was left while modules loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = work()
        sys.stdout.flush()
        return status
    except FomoeError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _drop_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_stdout()
        where = f"{error.filename}: " if error.filename else ""
        print(f"{program}: error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _fill_streams() -> None:
    """Standard streams that the caller has closed (>&-) lead nowhere: left as they are, files that
    are opened next would take their place, and Python would print figures on stdout.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _drop_stdout() -> None:
    """What could not be written must not be tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
