"""The exports of a recording: the HTML page, in a real browser, and the Chrome trace."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Chromium, find_chromium
from recordings import record

from fomoe.trace import Tracer
from fomoe.trace_format import Kind
from fomoe.tracing.page import fill_page, kept_steps, page_data
from fomoe.tracing.recording import read_recording
from fomoe.tracing.summary import Summary, summarise

TOOL = Path(__file__).parent.parent / "tools" / "trace"
TEMPLATE = TOOL.with_suffix(".html").read_text()


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(read_recording(record(tmp_path_factory.mktemp("run") / "t")))


def test_chrome_trace(tmp_path: Path, summary: Summary) -> None:
    out = tmp_path / "trace.json.gz"
    command = [sys.executable, "-P", TOOL, "show", summary.recording.path, "--perfetto", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    trace = json.loads(gzip.decompress(out.read_bytes()))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    kinds = summary.recording.records["kind"]
    drawn = (Kind.STEP, Kind.LAYER, Kind.COMPUTE, Kind.STALL, Kind.READ, Kind.PREFETCH)
    assert len(spans) == np.isin(kinds, drawn).sum()
    lanes: dict[int, list[dict[str, Any]]] = {}
    for span in spans:
        lanes.setdefault(span["tid"], []).append(span)
    for lane in lanes.values():
        lane.sort(key=lambda span: span["ts"])
        for before, after in pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    assert trace["otherData"]["fomoe"]["model"] == "acted-moe"


def test_page_is_self_contained_and_cannot_be_broken_out_of(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    with Tracer.create(tmp_path / "t", capacity=4, info={"model": hostile}) as tracer:
        tracer.event(Kind.STEP, 0, 10, token=0, a=1)
    page = fill_page(TEMPLATE, summarise(read_recording(tmp_path / "t")))
    assert hostile not in page
    assert page.count("</script>") == TEMPLATE.count("</script>")
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page)


def test_pages_of_long_runs_are_bounded(summary: Summary) -> None:
    t = summary.timeline
    kept = kept_steps(t, summary, budget=1000)
    assert 0 < kept.sum() < len(t.steps)
    assert kept[np.argmax(summary.times.wall[1:]) + 1]  # the slowest that fits
    detail = page_data(summary, budget=1000)["detail"]
    assert sum(len(lane["layer"]) for lane in detail.values()) * 3 // 8 <= 1000
    assert kept_steps(t, summary, budget=10**6).all()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium found: install chromium to test the page in a browser")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def page(browser: Chromium, tmp_path: Path, summary: Summary) -> Iterator[Chromium]:
    path = tmp_path / "page.html"
    path.write_text(fill_page(TEMPLATE, summary))
    browser.errors.clear()
    browser.open(path)
    yield browser
    assert not browser.errors


def box(page: Chromium, element: str) -> tuple[float, float, float, float]:
    page.run(f"document.getElementById('{element}').scrollIntoView({{block: 'center'}})")
    code = f"(r => [r.left, r.top, r.width, r.height])({element}.getBoundingClientRect())"
    left, top, width, height = page.run(code.replace(element, f"$('{element}')"))
    return left, top, width, height


def tip(page: Chromium) -> str:
    return str(page.run("$('tip').style.display == 'none' ? '' : $('tip').innerText"))


def test_page_shows_the_summary(page: Chromium, summary: Summary) -> None:
    assert page.run("$('title').textContent") == "acted-moe"
    cards = page.run("$('cards').innerText")
    assert f"{100 * summary.phases[0].hit_rate:.1f} %" in cards
    assert "GB/s while reading, of 1.25" in cards
    assert page.run("$('stalls').rows.length") == len(summary.stalls) + 1
    page.run("$('phase').value = 'prompt'; $('phase').onchange()")
    assert page.run("$('layers').rows.length") == 7


def test_wheel_drag_and_double_click_move_the_timeline(page: Chromium) -> None:
    left, top, width, _ = box(page, "lanes")
    x, y = left + width * 0.6, top + 30
    under = page.run(f"toTime({x - left})")
    before = page.run("view.to - view.from")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-600)
    zoomed = page.run("view.to - view.from")
    assert zoomed < before / 2
    assert page.run(f"toTime({x - left})") == pytest.approx(under, rel=0.01)
    start = page.run("view.from")
    page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    page.mouse("mouseMoved", x - 100, y, button="left", buttons=1)
    page.mouse("mouseReleased", x - 100, y, button="left", clickCount=1)
    assert page.run("view.from") > start
    assert page.run("view.to - view.from") == pytest.approx(zoomed)
    for count in (1, 2):
        page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=count)
        page.mouse("mouseReleased", x, y, button="left", clickCount=count)
    step = page.run("middleStep()")
    assert page.run("view.to - view.from") == pytest.approx(
        1.04 * page.run(f"steps.wall[{step}]"), rel=0.01
    )
    page.run("$('all').click()")
    page.settle()
    assert page.run("view.to - view.from") == pytest.approx(before)


def test_hover_names_what_is_under_the_pointer(page: Chromium) -> None:
    stall = page.run("(i => [stalls.layer[i], stalls.expert[i], whys[stalls.x[i]]])(stalls.n - 1)")
    page.run("look(stalls.begin.at(-1) - 500, stalls.begin.at(-1) + stalls.length.at(-1) + 500)")
    left, top, width, _ = box(page, "lanes")
    wanted = {
        "tokens": "Token 55",
        "layers": f"layer {stall[0]}",
        "stalls": f"Stalled: {stall[2]}",
        "reads": f"layer {stall[0]}, expert {stall[1]}",
    }
    for name, text in wanted.items():
        row = f"{stall[0]} * layerRow + 1" if name == "layers" else "3"
        y = top + page.run(f"lane('{name}').y + {row}")
        page.mouse("mouseMoved", left + 70 + (width - 70) / 2, y)
        assert text in tip(page), name
    page.mouse("mouseMoved", 5, 5)
    assert tip(page) == ""


def test_a_stall_of_the_table_is_shown_in_the_timeline(page: Chromium, summary: Summary) -> None:
    page.run("$('stalls').rows[3].click()")
    page.settle()
    stall = summary.stalls[2]
    start = int(summary.recording.records["begin"].min())
    middle = page.run("(view.from + view.to) / 2")
    assert middle == pytest.approx((stall.begin_ns + stall.wait_ns / 2 - start) / 1e3, abs=1)


def test_heat_map(page: Chromium, summary: Summary) -> None:
    left, top, *_ = box(page, "heat")
    page.mouse("mouseMoved", left + 71, top + 8)
    assert "Layer 0, expert 0" in tip(page)
    page.run("$('metric').value = 'misses'; $('order').value = 'sorted'; drawHeat()")
    most = page.run("Math.max(...heat.misses.slice(0, heat.experts))")
    page.mouse("mouseMoved", left + 72, top + 8)
    assert f"missed {most}" in tip(page)


@pytest.mark.parametrize("width", [360, 900, 2200])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_its_window(page: Chromium, tmp_path: Path, width: int, dark: bool) -> None:
    page.open(tmp_path / "page.html", width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 300) == dark


def test_pages_of_empty_recordings_open(browser: Chromium, tmp_path: Path) -> None:
    with Tracer.create(tmp_path / "t", capacity=4, info={}):
        pass
    path = tmp_path / "page.html"
    path.write_text(fill_page(TEMPLATE, summarise(read_recording(tmp_path / "t"))))
    browser.errors.clear()
    browser.open(path)
    for button in ("all", "slowest", "before", "after", "theme"):
        browser.run(f"$('{button}').click()")
    assert browser.run("$('shares').textContent") == "no step was recorded"
    assert not browser.errors
