"""tools/fidelity: a grid is measured once, continued where it stopped, and told as a front."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from points import Outcome, Point, Setting, append_point, distinct, front, read_points
from toy import K_TOY, write_toy

from fomoe.errors import FormatError, RequestError

FIDELITY = Path(__file__).parents[1] / "tools" / "fidelity"
SETTING = Setting(
    share=0.25, policy="lfu", rule="ratio:0.35", top_j=1, max_mass=1.0, weights="dampen",
    backfill=True,
)  # fmt: skip
OUTCOME = Outcome(
    tokens=100, misses=10.0, reads=20.0, substituted=30.0, moved=15.0, perplexity=9.0, ratio=1.01,
    ratio_error=0.001, kl=0.01, kl_error=0.001, same_first=95.0,
)  # fmt: skip


def point(misses, kl, **setting):
    outcome = dataclasses.replace(OUTCOME, misses=misses, kl=kl)
    return Point(dataclasses.replace(SETTING, **setting), outcome)


def run(*args):
    command = [sys.executable, str(FIDELITY), *map(str, args)]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def test_points_survive_a_file_and_the_longer_run_counts(tmp_path):
    path = tmp_path / "points.tsv"
    short = point(10.0, 0.02)
    long = Point(SETTING, dataclasses.replace(OUTCOME, tokens=500))
    other = point(11.0, 0.01, backfill=False, rule="max-rank:1,12")
    for p in (long, short, other):
        append_point(path, p)
    assert read_points(path) == [long, other]
    path.write_text("something else\n")
    with pytest.raises(FormatError, match="not a file of points"):
        read_points(path)


def test_the_front_holds_what_nothing_beats():
    a, b, c, d = point(5, 0.05), point(7, 0.01), point(8, 0.02), point(9, 0.001)
    assert front([d, c, b, a]) == [a, b, d]


def test_a_loop_has_few_distinct_grams():
    assert distinct(list(range(100)), 4) == 1.0
    assert distinct([1, 2, 3] * 40, 4) < 0.03


def test_a_setting_that_cannot_be_is_refused():
    assert dataclasses.replace(SETTING, rule="off").options().rule == "off"
    with pytest.raises(RequestError):
        dataclasses.replace(SETTING, rule="ratio:7").options()


def test_the_command_measures_what_is_missing_and_reports(tmp_path):
    toy = dataclasses.replace(K_TOY, layers=2, experts=16, top_k=4)
    model = write_toy(tmp_path / "toy.gguf", toy)
    text = tmp_path / "text"
    text.write_text("the thing on the other side of there, and the thing in it " * 8)
    out, md = tmp_path / "points.tsv", tmp_path / "front.md"
    grid = ["measure", "-m", model, "-f", text, "-o", out, "--share", 0.25, "--passages", 2]
    grid += ["--length", 24, "--unscored", 4, "--rule"]
    run(*grid, "off,ratio:0.1")
    before = out.read_bytes()
    assert "[1/1]" in run(*grid, "off,ratio:0.1,max-rank:1,12")
    assert out.read_bytes().startswith(before)
    exact, ratio, rank = read_points(out)
    assert exact.outcome.kl == 0.0 == exact.outcome.substituted
    assert ratio.outcome.kl > 0.0 < ratio.outcome.substituted
    assert ratio.outcome.misses < exact.outcome.misses
    assert rank.setting.text == "max-rank:1,12"
    assert rank.outcome.tokens == 38
    run("report", out, "--md", md)
    assert "| exact, lfu |" in md.read_text()
