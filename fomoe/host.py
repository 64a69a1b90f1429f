"""What the machine offers: memory that is free to use, processors.

Owns: reading /proc and control groups. Does not know: what the memory is for.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def num_processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """The processor as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def resident_bytes() -> int:
    """Memory the process occupies now (resident set), in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The largest resident set of the process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resident_bytes()


def forget_peak() -> bool:
    """Let peak_resident_bytes() begin anew. False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cache_dir() -> Path:
    """Where what is measured once is kept (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "fomoe"


def available_bytes() -> int:
    """Memory that the process could still take without swapping: the least of what the kernel calls
    available and what the control groups around the process leave."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    return min([available, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group (v1 or v2) that holds this process and has a limit leaves, in bytes:
    others in the group use its memory too, but its page cache makes way."""
    return [
        max(limit - used, 0)
        for folder, files in _groups()
        for used in [_used(folder, files)]
        for limit in (_number(folder / name) for name in files.limits)
        if limit is not None
    ]


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """What a version of control groups calls its files, and the page cache in `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_V1 = _GroupFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
# Above memory.high the kernel slows the group down: as good as a limit.
_V2 = _GroupFiles(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def _groups() -> Iterator[tuple[Path, _GroupFiles]]:
    """The memory groups around the process, from its own to the root."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _GROUP_ROOT, _V2
        elif "memory" in controllers.split(","):
            root, files = _GROUP_ROOT / "memory", _V1
        else:
            continue
        # In a container the path may be the host's, which is not to be seen here: the root is.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, files
            if folder == root:
                break


def _used(folder: Path, files: _GroupFiles) -> int:
    usage = _number(folder / files.usage)
    if usage is None:
        return resident_bytes()
    fields = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return usage - sum(int(field[1]) for field in fields if field[0] in files.cache)


def _number(path: Path) -> int | None:
    """The number in a file; None when there is none, or it says "max"."""
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
