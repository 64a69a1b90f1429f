"""What the machine offers, with control groups of both versions made of files."""

import pytest

from fomoe import host

FREE = 1 << 40


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes the process's groups and their files: groups(lines, {path: text})."""

    def write(own, files):
        monkeypatch.setattr(host, "_GROUP_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "own")
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return host._left_in_groups()

    return write


def test_a_peak_is_forgotten():
    held = b"x" * (64 << 20)
    peak = host.peak_resident_bytes()
    del held
    if not host.forget_peak():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert host.peak_resident_bytes() < peak - (32 << 20)


def test_version_2_counts_what_others_use_but_not_the_page_cache(groups):
    left = groups(
        "0::/jobs/mine\n",
        {
            "memory.max": "max",
            "jobs/memory.max": 8000,
            "jobs/memory.current": 3000,
            "jobs/memory.stat": "anon 2000\nfile 1000\ninactive_file 700\nactive_file 300",
            "jobs/mine/memory.max": "max",
            "jobs/mine/memory.high": 5000,
            "jobs/mine/memory.current": 1500,
        },
    )
    assert left == [3500, 6000]


def test_version_1(groups):
    left = groups(
        "5:cpu,memory:/mine\n4:pids:/other\n",
        {
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 500,
            "memory/mine/memory.limit_in_bytes": 4000,
            "memory/mine/memory.usage_in_bytes": 1000,
            "memory/mine/memory.stat": "cache 600\ntotal_inactive_file 400\ntotal_active_file 200",
        },
    )
    assert left == [3600, 9223372036854771712 - 500]


def test_a_path_of_the_host_falls_back_to_the_root_that_is_seen(groups):
    assert groups("0::/../../pod/abc", {"memory.max": 700, "memory.current": 900}) == [0]


@pytest.mark.parametrize("own", ["", "1:name=systemd:/x\n", "0::/\n"])
def test_no_limits(groups, own):
    assert groups(own, {}) == []
    assert host.available_bytes() > 1 << 20


def test_no_groups_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "nothing")
    assert host._left_in_groups() == []


def test_the_least_counts(groups):
    groups("0::/", {"memory.max": 5 << 20, "memory.current": 1 << 20})
    assert host.available_bytes() == 4 << 20
