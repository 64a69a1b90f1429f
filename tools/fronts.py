"""The fidelity study as tables and a plot: fronts of misses against what they cost.

Owns: what a reader is shown of points. Does not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from points import Point, cost, front

from fomoe.errors import RequestError

# FOMOE's own: no pick is safe, weights renormalised, the cache forgets by recency alone.
_FOMOE = {"rule": "ratio:0.35", "top_j": 0, "weights": "renorm", "policy": "lru", "max_mass": 1.0}
_COLOURS = {
    "budget": "tab:brown",
    "light": "tab:purple",
    "ratio": "tab:blue",
    "prior": "tab:green",
    "max-rank": "tab:orange",
}


def is_fomoe(point: Point) -> bool:
    return all(getattr(point.setting, name) == value for name, value in _FOMOE.items())


def report(points: Sequence[Point], loops: str = "") -> list[str]:
    """Markdown: for every budget FOMOE's rule, exact routing, and the front; then the bars."""
    lines: list[str] = []
    for share in sorted({p.setting.share for p in points}):
        here = [p for p in points if p.setting.share == share]
        lines += [f"### Slots for {100 * share:g} % of the experts", "", *_table(here), ""]
        lines += [*_bars(here), ""]
    if loops:
        lines += ["### Long generations", "", *_loops(loops), ""]
    return lines[:-1]


def _table(points: Sequence[Point]) -> list[str]:
    exact = sorted((p for p in points if p.setting.rule == "off"), key=_misses)
    fomoe = [p for p in points if is_fomoe(p)]
    ours = [p for p in points if p.setting.rule != "off" and not is_fomoe(p)]
    best = front(ours)
    rows = [(p, "") for p in exact] + [(p, "FOMOE: ") for p in fomoe] + [(p, "") for p in best]
    return [
        "| setting | misses, % of picks | all reads | substituted % | weight moved % "
        "| KL, nats | perplexity | same first % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(p, prefix) for p, prefix in rows),
    ]


def _row(point: Point, prefix: str) -> str:
    o = point.outcome
    figures = [f"{o.misses:.1f}", f"{o.reads:.1f}"]
    if point.setting.rule == "off":
        return (
            f"| {point.setting.text} | " + " | ".join([*figures, "0", "0", "0", "0", "100"]) + " |"
        )
    figures += [
        f"{o.substituted:.1f}",
        f"{o.moved:.1f}",
        f"{o.kl:.4f} +- {o.kl_error:.4f}",
        f"{point.increase:+.2f} +- {100 * o.ratio_error:.2f} %",
        f"{o.same_first:.1f}",
    ]
    return f"| {prefix}{point.setting.text} | " + " | ".join(figures) + " |"


def _bars(points: Sequence[Point]) -> list[str]:
    """At the misses of FOMOE's rule, how much less it costs; at +1 %, how many misses are left."""
    lines = []
    ours = [p for p in points if p.setting.rule != "off" and not is_fomoe(p)]
    for fomoe in (p for p in points if is_fomoe(p)):
        level = [p for p in ours if p.outcome.misses <= fomoe.outcome.misses]
        if not level:
            continue
        best = min(level, key=lambda p: cost(p, "kl"))
        lines.append(
            f"- At FOMOE's misses ({fomoe.outcome.misses:.1f} %, {fomoe.setting.text}:"
            f" {fomoe.increase:+.2f} %, KL {fomoe.outcome.kl:.4f}): {best.setting.text},"
            f" {best.outcome.misses:.1f} %, {best.increase:+.2f} %, KL {best.outcome.kl:.4f}."
        )
    exact = [p for p in points if p.setting.rule == "off"]
    level = [p for p in ours if p.increase <= 1.0]
    if exact and level:
        fewest, base = min(level, key=_misses), min(exact, key=_misses)
        lines.append(
            f"- At no more than +1 %: {fewest.setting.text}, {fewest.outcome.misses:.1f} % of"
            f" {base.outcome.misses:.1f} % misses are left ({fewest.increase:+.2f} %)."
        )
    return lines


def _loops(text: str) -> list[str]:
    """Means over prompts of the shares of distinct n-grams."""
    head, *rows = [line.split("\t") for line in text.splitlines()]
    sums: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        sums.setdefault((row[0], row[1]), []).append([float(cell) for cell in row[4:]])
    lines = [
        "| slots | setting | generations | "
        + " | ".join(f"{name}-grams %" for name in head[4:])
        + " |",
        "|---|---|---:|" + "---:|" * len(head[4:]),
    ]
    for (share, setting), values in sums.items():
        means = [f"{sum(column) / len(column):.1f}" for column in zip(*values, strict=True)]
        lines.append(
            f"| {100 * float(share):g} % | {setting} | {len(values)} | " + " | ".join(means) + " |"
        )
    return lines


def _misses(point: Point) -> float:
    return point.outcome.misses


def plot(points: Sequence[Point], path: Path) -> None:
    """A column for each budget: above, KL divergence, below, the increase of perplexity, both
    against misses."""
    try:
        import matplotlib
    except ImportError:
        raise RequestError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted({p.setting.share for p in points})
    figure, panels = plt.subplots(
        2, len(shares), figsize=(3.9 * len(shares), 7), squeeze=False, layout="constrained"
    )
    for column, share in enumerate(shares):
        here = [p for p in points if p.setting.share == share]
        for row, by in enumerate(("kl", "increase")):
            panel = panels[row][column]
            _scatter(panel, here, by)
            panel.set(xlabel="picks read on demand, %")
            panel.grid(alpha=0.3)
            if by == "kl":
                panel.set(yscale="log", title=f"slots for {100 * share:g} % of the experts")
    panels[0][0].set_ylabel("KL divergence from exact routing, nats")
    panels[1][0].set_ylabel("increase of perplexity, %")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def _scatter(draw: Any, points: Sequence[Point], by: str) -> None:
    ours = [p for p in points if p.setting.rule != "off" and not is_fomoe(p)]
    for kind, colour in _COLOURS.items():
        for backfill in (True, False):
            some = [p for p in ours if (p.setting.kind, p.setting.backfill) == (kind, backfill)]
            if some:
                draw.plot(
                    [p.outcome.misses for p in some],
                    [cost(p, by) for p in some],
                    "o" if backfill else "x",
                    color=colour,
                    markersize=4,
                    label=kind + ("" if backfill else ", no backfill"),
                )
    best = front(ours, by=by)
    draw.step(
        [p.outcome.misses for p in best],
        [cost(p, by) for p in best],
        "k-",
        where="post",
        linewidth=0.8,
        label="front",
    )
    for p in (p for p in points if is_fomoe(p)):
        draw.plot(p.outcome.misses, cost(p, by), "r*", markersize=11)
    draw.plot([], [], "r*", label="FOMOE's rule and cache")
    for p in (p for p in points if p.setting.rule == "off" and p.setting.policy == "lfu"):
        draw.axvline(p.outcome.misses, color="0.5", linestyle=":", linewidth=1)
