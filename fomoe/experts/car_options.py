"""What a user says of cache-aware routing: a rule, its number, its bounds.

Owns: the rules' names, their text on a command line, their checks. Does not know: what they do to a
selection (car.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Literal, get_args

from fomoe.errors import RequestError

Rule = Literal["off", "budget", "light", "ratio", "prior", "max-rank"]
Weights = Literal["dampen", "renorm"]

# What a rule's name alone stands for, and "on" for the rule to be had without naming one: at every
# number of slots it lost least for the reads that it saved (tools/studies/fidelity.md).
_USUAL = {
    "on": "budget:0.28",
    "budget": "budget:0.28",
    "light": "light:1",
    "ratio": "ratio:0.35",
    "prior": "prior:0.25",
    "max-rank": "max-rank:1,32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CarOptions:
    """Which stand-ins are allowed.

    light     for picks of at most `value` times the mean weight of a layer's picks; the best that
              is there, whatever its distance
    budget    as light, with a multiple that follows, so that over some tens of tokens the displaced
              experts' share of the picks' weight is `value` at most
    ratio     C for E when p_C / p_E >= value (FOMOE's rule; best pairs first)
    prior     top-k of z + value * D for experts that are there, D the layer's running logit range
    max-rank  the best of the true top `max_rank` that are there, whatever their distance

    Under every rule the true top `top_j` stay, and the displaced experts' share of the picks'
    weight is at most `max_mass` per token and layer. Weights come from the router's own
    probabilities: "dampen" keeps their normaliser, so that what a stand-in lacks is dropped;
    "renorm" gives the selection the sum that the picks had. Raises RequestError for values that
    cannot be.
    """

    rule: Rule = "off"
    value: float = 0.0
    max_rank: int = 0
    top_j: int = 1
    max_mass: float = 1.0
    weights: Weights = "dampen"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise RequestError(f"no CAR rule {self.rule!r}; there are {', '.join(get_args(Rule))}")
        if self.weights not in get_args(Weights):
            raise RequestError(f"CAR weights are dampen or renorm, not {self.weights!r}")
        if self.rule == "ratio" and not 0.0 < self.value <= 1.0:
            raise RequestError(f"CAR ratio: 0 < tau <= 1, not {self.value:g}")
        if self.rule == "budget" and not 0.0 < self.value < 1.0:
            raise RequestError(f"CAR budget: 0 < share of the weight < 1, not {self.value:g}")
        if self.rule in ("light", "prior") and not (self.value > 0.0 and isfinite(self.value)):
            raise RequestError(f"CAR {self.rule}: a positive number, not {self.value:g}")
        if self.rule == "max-rank" and self.max_rank <= self.top_j:
            raise RequestError(
                f"CAR max-rank: M must exceed J, but J is {self.top_j} and M {self.max_rank}"
            )
        if self.top_j < 0:
            raise RequestError(f"CAR top-j is a number of experts, not {self.top_j}")
        if not 0.0 < self.max_mass <= 1.0:
            raise RequestError(f"CAR max-mass: 0 < mass <= 1, not {self.max_mass:g}")

    @property
    def limit(self) -> float:
        """What the rule goes by, at first: the largest gap of logits that ratio allows, what prior
        multiplies the running range of logits with, what a pick may weigh to be replaced under
        light and budget, in mean weights. Infinite where there is none."""
        limits = {
            "budget": 1.0,
            "light": self.value,
            "prior": self.value,
            "ratio": -log(self.value or 1.0),
        }
        return limits.get(self.rule, inf)

    @staticmethod
    def parse(
        rule: str,
        *,
        top_j: int | None = None,
        max_mass: float | None = None,
        weights: str | None = None,
    ) -> CarOptions:
        """Options from text such as "off", "on", "budget:0.28", "light:1", "ratio:0.35",
        "prior:0.12" or "max-rank:2,12" (J and M), or from a rule's name alone. Raises
        RequestError."""
        if rule == "max-rank" and top_j is not None:
            rule = f"max-rank:{top_j},32"
        name, _, text = _USUAL.get(rule, rule).partition(":")
        try:
            numbers = [float(part) for part in text.split(",")] if text else []
        except ValueError:
            numbers = []
        expected = {"off": 0, "budget": 1, "light": 1, "ratio": 1, "prior": 1, "max-rank": 2}.get(
            name
        )
        whole = name != "max-rank" or all(number.is_integer() for number in numbers)
        if expected is None or len(numbers) != expected or (text and not numbers) or not whole:
            raise RequestError(
                f"CAR rule {rule!r} is not one of off, on, budget:SHARE, light:TIMES, ratio:TAU,"
                " prior:LAMBDA, max-rank:J,M"
            )
        if name == "max-rank":
            if top_j not in (None, int(numbers[0])):
                raise RequestError(f"CAR rule {rule!r} names its own top-j; drop the other one")
            top_j = int(numbers[0])
        default = CarOptions()
        return CarOptions(
            rule=name,  # type: ignore[arg-type]  # __post_init__ checks it
            value=numbers[0] if expected == 1 else 0.0,
            max_rank=int(numbers[1]) if expected == 2 else 0,
            top_j=default.top_j if top_j is None else top_j,
            max_mass=default.max_mass if max_mass is None else max_mass,
            weights=default.weights if weights is None else weights,  # type: ignore[arg-type]
        )
