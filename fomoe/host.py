"""What the machine offers: memory that is free to use, processors.

Owns: reading /proc and control groups. Does not know: what the memory is for.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

_GROUP_ROOT = Path("/sys/fs/cgroup")


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
    for limit in _group_limits():
        available = min(available, max(limit - resident_bytes(), 0))
    return available


def _group_limits() -> list[int]:
    """Memory limits of the control groups (v1 and v2) that hold this process, in bytes."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = _GROUP_ROOT, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = _GROUP_ROOT / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == base.parent or not folder.is_relative_to(base):
                break
            text = _read(folder / name)
            if text.isdigit():
                limits.append(int(text))
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
