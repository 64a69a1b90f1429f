"""fomoe.native: the C library, as cffi's `ffi` and `lib`.

Functions return 0 or -errno; `check` turns a negative result into an OSError.
Nothing here knows what a model, a tensor or an expert is.
"""

import os

from fomoe.native._native import ffi, lib

__all__ = ["check", "ffi", "lib"]


def check(result: int, what: str) -> int:
    """Return `result` unless it is a negative errno, which is raised as OSError naming `what`."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result
