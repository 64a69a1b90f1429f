"""A point of the fidelity study: a setting of cache-aware routing, and what it cost and saved.

Owns: the file of points (tab-separated, one a line, appended as they are measured) and the Pareto
front among them. Does not know: engines, plots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe.errors import FormatError
from fomoe.experts.car_options import CarOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured: slots for `share` of the experts, and who may stand in."""

    share: float
    policy: str
    rule: str  # as --car takes it
    top_j: int
    max_mass: float
    weights: str
    backfill: bool

    def options(self) -> CarOptions:
        """Raises RequestError for a rule that cannot be."""
        if self.rule == "off":
            return CarOptions()
        return CarOptions.parse(
            self.rule, top_j=self.top_j, max_mass=self.max_mass, weights=self.weights
        )

    @property
    def kind(self) -> str:
        return self.rule.partition(":")[0]

    @property
    def text(self) -> str:
        """What a reader needs to tell settings of one budget apart."""
        if self.rule == "off":
            return f"exact, {self.policy}"
        parts = [self.rule]
        if self.kind != "max-rank":
            parts.append(f"top-j {self.top_j}")
        if self.max_mass < 1.0:
            parts.append(f"mass {self.max_mass:g}")
        parts += [w for w in (self.weights,) if w != "dampen"]
        parts += [p for p in (self.policy,) if p != "lfu"]
        return ", ".join(parts + ["no backfill"] * (not self.backfill))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Shares of picks in %; half-widths of 95 % intervals. `ratio` is the perplexity over that of
    exact routing on the same tokens, `kl` the mean divergence from it in nats."""

    tokens: int
    misses: float  # read on demand
    reads: float  # all reads, those in the background too
    substituted: float
    moved: float  # share of the weight, %
    perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    same_first: float  # tokens with the same first choice, %


@dataclass(frozen=True, slots=True)
class Point:
    setting: Setting
    outcome: Outcome

    @property
    def increase(self) -> float:
        """Of the perplexity, %."""
        return 100.0 * (self.outcome.ratio - 1.0)

    @property
    def line(self) -> str:
        """The point in short, for who waits for it."""
        o = self.outcome
        return (
            f"{100 * self.setting.share:g} % {self.setting.text}: misses {o.misses:.1f} %,"
            f" PPL {self.increase:+.2f} +- {100 * o.ratio_error:.2f} %,"
            f" KL {o.kl:.4f} +- {o.kl_error:.4f}"
        )


_FIELDS = [*dataclasses.fields(Setting), *dataclasses.fields(Outcome)]


def append_point(path: Path, point: Point) -> None:
    values = dataclasses.asdict(point.setting) | dataclasses.asdict(point.outcome)
    line = "\t".join(
        f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values()
    )
    if not path.exists():
        path.write_text("\t".join(field.name for field in _FIELDS) + "\n")
    with path.open("a") as file:
        file.write(line + "\n")


def read_points(path: Path) -> list[Point]:
    """The points of a file, or none; of each setting the one with the most tokens. FormatError."""
    if not path.exists():
        return []
    head, *lines = path.read_text().splitlines()
    if head.split("\t") != [field.name for field in _FIELDS]:
        raise FormatError(f"{path} is not a file of points")
    best: dict[Setting, Point] = {}
    for line in lines:
        cells = line.split("\t")
        if len(cells) != len(_FIELDS):
            raise FormatError(f"{path}: a line of {len(cells)} cells: {line!r}")
        values = {
            field.name: _parse(str(field.type), cell)
            for field, cell in zip(_FIELDS, cells, strict=True)
        }
        names = [field.name for field in dataclasses.fields(Setting)]
        setting = Setting(**{name: values.pop(name) for name in names})
        point = Point(setting, Outcome(**values))
        if setting not in best or best[setting].outcome.tokens <= point.outcome.tokens:
            best[setting] = point
    return list(best.values())


def _parse(kind: str, text: str) -> Any:
    if kind == "bool":
        return text == "True"
    return {"int": int, "float": float}.get(kind, str)(text)


def front(points: Iterable[Point], *, by: str = "kl") -> list[Point]:
    """Those that no other beats in both misses and `by` ("kl" or "increase"), fewest misses
    first."""
    result: list[Point] = []
    for point in sorted(points, key=lambda p: (p.outcome.misses, cost(p, by))):
        if not result or cost(point, by) < cost(result[-1], by):
            result.append(point)
    return result


def cost(point: Point, by: str) -> float:
    return point.outcome.kl if by == "kl" else point.increase


def distinct(tokens: Sequence[int], n: int) -> float:
    """Of a text's n-grams, the share that differ from each other: it falls when a text loops."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)
