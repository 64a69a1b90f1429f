"""Which reader: chosen once, by name, when the files are opened.

Owns: the choice and its reasons. Does not know: what is read.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fomoe.errors import UnsupportedError
from fomoe.io.files import Direct, Files, open_files
from fomoe.io.queued import QueuedReader, ReadOptions
from fomoe.io.reader import Reader
from fomoe.io.replicas import ReplicaReader, check_same, replica_paths
from fomoe.io.ring import UringReader
from fomoe.io.threads import ThreadReader

Io = Literal["auto", "uring", "threads"]

_REFUSALS = {
    errno.ENOSYS: "this system has no io_uring",
    errno.EPERM: "io_uring is forbidden here (a container's seccomp filter, io_uring_disabled)",
    errno.ENOMEM: "no memory for a ring (RLIMIT_MEMLOCK)",
}


def open_reader(
    paths: Sequence[str | os.PathLike[str]],
    *,
    loop: asyncio.AbstractEventLoop,
    io: Io = "auto",
    direct: Direct = "auto",
    replicas: Sequence[Path] = (),
    options: ReadOptions | None = None,
) -> Reader:
    """A reader of `paths`, numbered in that order. To be called on the loop's thread.

    `replicas` are folders, or files in folders, that hold copies of all the files: they are read
    side by side, by speed. ReadError when a copy is not one, as far as samples of it tell.

    "auto" takes io_uring, and threads where it is refused; direct reads, and buffered ones where a
    file system refuses them. `describe()` of the reader says what was taken and why.
    UnsupportedError when what is forced cannot be had, ReadError when a file cannot be opened.
    """
    readers = [_open_one(paths, loop, io, direct, options)]
    places = [paths]
    try:
        for replica in replicas:
            copies = replica_paths(paths, replica)
            for others in places:
                check_same(others, copies)
            places.append(copies)
            readers.append(_open_one(copies, loop, io, direct, options))
    except BaseException:
        for reader in readers:
            reader.close_now()
        raise
    if len(readers) == 1:
        return readers[0]
    return ReplicaReader(readers, [str(paths[0]), *map(str, replicas)])


def _open_one(
    paths: Sequence[str | os.PathLike[str]],
    loop: asyncio.AbstractEventLoop,
    io: Io,
    direct: Direct,
    options: ReadOptions | None,
) -> QueuedReader:
    assert io in ("auto", "uring", "threads")
    files = open_files(paths, direct)
    try:
        return _choose(files, io, options, loop)
    except BaseException:
        files.close()
        raise


def _choose(
    files: Files, io: Io, options: ReadOptions | None, loop: asyncio.AbstractEventLoop
) -> QueuedReader:
    why = ""
    if io != "threads":
        try:
            return UringReader(files, loop, options)
        except OSError as error:
            why = _REFUSALS.get(error.errno or 0, str(error))
            if io == "uring":
                raise UnsupportedError(f"{why}; use --io threads or auto") from error
    return ThreadReader(files, loop, options, why=why)
