"""The choice of a way of reading: made once, named, refused clearly."""

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from io_rig import write_bytes

from fomoe.errors import FomoeError, ReadError, UnsupportedError
from fomoe.io import files as files_module
from fomoe.io import queued
from fomoe.io.files import open_files, superset
from fomoe.io.open import open_reader
from fomoe.native import lib


def describe(paths: list[Path], **choice: Any) -> str:
    async def opened() -> str:
        reader = open_reader(paths, loop=asyncio.get_running_loop(), **choice)
        text = reader.describe()
        await reader.close()
        return text

    return asyncio.run(opened())


class Refusing:
    """The native library of a system that refuses some calls."""

    def __init__(self, **refusals: int) -> None:
        self._refusals = refusals

    def __getattr__(self, name: str) -> Any:
        if name in self._refusals:
            return lambda *_: -self._refusals[name]
        return getattr(lib, name)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bytes(tmp_path / "a", 10_000)
    return tmp_path / "a"


@pytest.mark.parametrize("alignment", [1, 512, 4096])
def test_superset(alignment: int) -> None:
    for offset in (0, 1, 511, 512, 4095, 4096, 10_000):
        for length in (1, 511, 4096, 9999):
            around = superset(offset, length, alignment)
            assert around.offset % alignment == around.length % alignment == 0
            assert around.offset + around.residue == offset
            assert around.residue + length <= around.length < around.residue + length + alignment


def test_choices_are_named(path: Path) -> None:
    assert describe([path], io="uring", direct="on").startswith("io_uring, O_DIRECT, ")
    assert "files registered: yes, memory registered: no" in describe([path])
    assert describe([path], io="threads", direct="off") == "threads, buffered reads, 20 threads"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_a_refused_ring(path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr("fomoe.io.ring.lib", Refusing(fomoe_ring_open=error))
    before = num_descriptors()
    text = describe([path])
    assert text.startswith("threads, O_DIRECT")
    assert "io_uring" in text or "RLIMIT_MEMLOCK" in text
    with pytest.raises(UnsupportedError, match="--io threads"):
        describe([path], io="uring")
    assert num_descriptors() == before


def test_memory_that_cannot_be_registered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "lib", Refusing(fomoe_reader_register=errno.ENOMEM))

    async def check() -> None:
        reader = open_reader([path], loop=asyncio.get_running_loop(), io="uring")
        assert not reader.register_memory(1 << 21, 1 << 21)
        assert reader.describe().endswith("memory registered: no (RLIMIT_MEMLOCK)")
        await reader.close()

    asyncio.run(check())


def test_a_file_system_without_direct_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing(fomoe_file_alignment=errno.EOPNOTSUPP)
    monkeypatch.setattr(files_module, "lib", refusing)
    before = num_descriptors()
    assert "buffered reads (" in describe([path])
    with pytest.raises(UnsupportedError, match="direct"):
        describe([path], direct="on")
    assert num_descriptors() == before


def test_direct_reads_that_fail_only_when_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    opened = open_files([path])
    assert not opened.direct
    assert opened.alignment == 1
    assert str(path) in opened.why
    opened.close()


def test_an_alignment_that_the_system_does_not_tell(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "lib", Refusing(fomoe_file_alignment=0))
    opened = open_files([path], "on")
    assert opened.alignment == 4096
    opened.close()


def test_a_missing_file(path: Path) -> None:
    before = num_descriptors()
    with pytest.raises(ReadError, match=r"absent.*No such file"):
        describe([path, path.parent / "absent"])
    assert issubclass(ReadError, FomoeError)
    assert num_descriptors() == before


FORBIDDEN = """
import asyncio, ctypes, struct, sys
from fomoe.errors import UnsupportedError
from fomoe.io.open import open_reader

# Load the number of the system call; io_uring_setup (425 on every architecture): EPERM; else allow.
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, program) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(77)

async def check():
    loop = asyncio.get_running_loop()
    reader = open_reader([sys.argv[1]], loop=loop)
    print(reader.describe())
    await reader.close()
    try:
        open_reader([sys.argv[1]], loop=loop, io="uring")
    except UnsupportedError as error:
        print(error)

asyncio.run(check())
"""


def test_a_container_that_forbids_io_uring(path: Path) -> None:
    command = [sys.executable, "-P", "-c", FORBIDDEN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("no seccomp here")
    assert done.returncode == 0, done.stderr
    chosen, refused = done.stdout.splitlines()[-2:]
    assert chosen.startswith("threads, ")
    assert "io_uring is forbidden here" in chosen
    assert refused.startswith("io_uring is forbidden here")
