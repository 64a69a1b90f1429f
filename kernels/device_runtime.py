"""The few calls of the CUDA or HIP runtime that torch does not offer.

Owns: finding the library that torch has loaded, and its calling convention, which is the same for
both but for the names. Does not know: streams' work, memory.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fomoe.errors import UnsupportedError
from fomoe.native import ffi, lib

_LIBRARIES = {"cuda": "libcudart", "hip": "libamdhip64"}
_COPY_BY_ADDRESS = 4  # cudaMemcpyDefault: the addresses tell what they are of
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices
_ALREADY_REGISTERED = 712


class Runtime:
    """`kind`: "cuda" or "hip". `library`: has the functions, for tests."""

    def __init__(self, kind: str, library: Any = None) -> None:
        if library is None:
            library = ctypes.CDLL(str(_loaded(_LIBRARIES[kind])))
        self._get_last_error = _function(library, f"{kind}GetLastError")
        self._error_string = getattr(library, f"{kind}GetErrorString")
        self._error_string.restype = ctypes.c_char_p
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy = _function(
            library, f"{kind}MemcpyAsync", pointer, pointer, size, ctypes.c_int, pointer
        )
        self._register = _function(library, f"{kind}HostRegister", pointer, size, ctypes.c_uint)
        self._unregister = _function(library, f"{kind}HostUnregister", pointer)
        self._launch = _function(library, f"{kind}LaunchHostFunc", pointer, pointer, pointer)
        self._wake = int(ffi.cast("intptr_t", ffi.addressof(lib, "fomoe_wake")))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy between any two addresses."""
        self._check(self._copy(target, source, nbytes, _COPY_BY_ADDRESS, stream), "a copy")

    def wake(self, fd: int, stream: int) -> None:
        """Queue a write to an eventfd."""
        self._check(self._launch(stream, self._wake, fd), "a host function")

    def pin(self, address: int, nbytes: int) -> bool:
        """Pin host memory; False where it is pinned already. Raises OSError."""
        rc = self._register(address, nbytes, _PORTABLE)
        if rc:
            self._get_last_error()  # or a later call of torch's would report it
        if rc not in (0, _ALREADY_REGISTERED):
            raise OSError(errno.ENOMEM, self._text(rc))
        return rc == 0

    def unpin(self, address: int) -> None:
        self._check(self._unregister(address), "unpinning")

    def _check(self, rc: int, what: str) -> None:
        if rc:
            raise RuntimeError(f"{what} failed on the GPU: {self._text(rc)}")

    def _text(self, rc: int) -> str:
        text = self._error_string(rc)
        return text.decode() if text else f"error {rc}"


def _function(library: Any, name: str, *types: Any) -> Callable[..., int]:
    function: Any = getattr(library, name)
    function.argtypes, function.restype = types, ctypes.c_int
    return function  # type: ignore[no-any-return]


def _loaded(name: str) -> Path:
    """The library that this process has loaded whose file's name begins so."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name):
            return path
    raise UnsupportedError(
        f"torch has not loaded {name}, which --device needs: install torch from the wheels of"
        " pytorch.org for your GPU, or use --device cpu"
    )
