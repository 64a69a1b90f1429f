"""The files that a reader reads, open, directly where their file systems allow it.

Owns: descriptors, the choice between direct and buffered reads, and what direct reads must be
aligned to. Does not know: how reads are issued.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fomoe.errors import ReadError, UnsupportedError
from fomoe.native import lib

Direct = Literal["auto", "on", "off"]

# What every drive and file system takes, for systems that do not say what they need (Linux < 6.1).
FALLBACK_ALIGNMENT = 4096


class Superset(NamedTuple):
    """The aligned range that holds a byte range; the range begins `residue` bytes into it."""

    offset: int
    length: int
    residue: int


def superset(offset: int, length: int, alignment: int) -> Superset:
    """The smallest range of whole blocks of `alignment` bytes around `length` bytes at `offset`."""
    residue = offset % alignment
    return Superset(offset - residue, -(-(residue + length) // alignment) * alignment, residue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Open files. `alignment` is of offsets, lengths and addresses; 1 when reads are buffered."""

    paths: tuple[str, ...]
    descriptors: tuple[int, ...]
    direct: bool
    alignment: int
    why: str  # buffered reads were chosen; empty when direct or asked for

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def describe(self) -> str:
        if self.direct:
            return f"O_DIRECT, {self.alignment}-byte alignment"
        return f"buffered reads ({self.why})" if self.why else "buffered reads"


def open_files(paths: Sequence[str | os.PathLike[str]], direct: Direct = "auto") -> Files:
    """Open files for reading, all of them directly or none.

    ReadError when one cannot be opened; UnsupportedError when direct reads are forced and a file
    system refuses them.
    """
    names = tuple(os.fspath(path) for path in paths)
    assert names
    assert direct in ("auto", "on", "off")
    if direct == "off":
        return _open_all(names, os.O_RDONLY, why="")
    try:
        return _open_all(names, os.O_RDONLY | os.O_DIRECT, why="")
    except _RefusedError as refusal:
        if direct == "on":
            raise UnsupportedError(
                f"{refusal}; use --direct auto or off, or a file system that has direct reads"
            ) from None
        return _open_all(names, os.O_RDONLY, why=str(refusal))


class _RefusedError(Exception):
    """A file system refuses direct reads."""


def _open_all(names: tuple[str, ...], flags: int, why: str) -> Files:
    descriptors: list[int] = []
    alignment = 1
    tried: set[int] = set()
    try:
        for name in names:
            descriptors.append(_open(name, flags))
            if flags & os.O_DIRECT:
                alignment = max(alignment, _direct_alignment(name, descriptors[-1], tried))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return Files(
        paths=names,
        descriptors=tuple(descriptors),
        direct=bool(flags & os.O_DIRECT),
        alignment=alignment,
        why=why,
    )


def _open(name: str, flags: int) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC)
    except OSError as error:
        if flags & os.O_DIRECT and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            raise _RefusedError(f"{name}: its file system refuses O_DIRECT") from None
        raise ReadError(f"{name}: cannot be opened: {error.strerror}") from error


def _direct_alignment(name: str, descriptor: int, tried: set[int]) -> int:
    """What the file's direct reads must be aligned to; one trial read for each file system, since
    some take the flag and refuse the reads."""
    told: int = lib.fomoe_file_alignment(descriptor)
    if told < 0:
        raise _RefusedError(f"{name}: its file system has no direct reads")
    alignment = told or FALLBACK_ALIGNMENT
    device = os.fstat(descriptor).st_dev
    if device not in tried:
        tried.add(device)
        block = mmap.mmap(-1, -(-alignment // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            os.preadv(descriptor, [memoryview(block)[:alignment]], 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                raise _RefusedError(f"{name}: its file system refuses direct reads") from None
            raise ReadError(f"{name}: cannot be read: {error.strerror}") from error
    return alignment
