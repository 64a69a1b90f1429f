"""Looking ahead on devices: what the next layer's router says of the residual stream as it is.

Owns: asking it, and copying to the next layer's device what it will probably pick. Does not know:
the step at hand, how predictions are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fomoe.chunks import distinct
from fomoe.experts.step import ExpertStep
from fomoe.experts.tiered import TieredStore
from fomoe.kernels.ops import SHORT_STEP, Routing, Segment
from fomoe.models import Layer
from fomoe.places import Place
from fomoe.residency import Residency
from fomoe.turn import Turn


class Lookahead:
    """`places`: of each layer."""

    def __init__(self, places: Sequence[Place], store: TieredStore, residency: Residency) -> None:
        self._places, self._store, self._residency = places, store, residency
        self._guesses: dict[int, _Guess] = {}  # by layer, until the layer's own picks are known

    def clear(self) -> None:
        self._guesses.clear()

    def forget(self, index: int) -> None:
        """The layer's own picks are known."""
        self._guesses.pop(index, None)

    def asks(self, layer: Layer) -> bool:
        """Whether it is worth asking the layer's router ahead of its turn."""
        index = layer.parameters.index
        return not self._places[index].tier.holds_all(index)

    def ask(self, layer: Layer, turn: Turn, segments: Sequence[Segment]) -> None:
        """Queue the next layer's router, on that layer's device, for the residual stream that was
        `turn.taken` before this layer's experts: what it says arrives while those are being
        computed. That of a few tokens runs beside them, too."""
        place, at, tokens = self._places[layer.parameters.index], turn.place, turn.tokens
        device, ready = place.device, turn.taken
        assert ready is not None, "nothing was taken for who asks"
        if place is not at:
            place.bring_peek(at, tokens, ready)
            ready = device.compute.record()
        stream = device.aside if tokens <= SHORT_STEP else device.compute
        if stream is not device.compute:
            stream.wait(ready)
        guess = _Guess(layer, place.peek(tokens))
        self._guesses[guess.index] = guess
        stream.call(partial(guess.do_route, place, segments))
        told = stream.record()
        for reader in (at, place):
            reader.peeked(told)
        device.when(told, partial(self._heard, guess))

    def _heard(self, guess: _Guess) -> None:
        """The next layer's router has said what it would pick."""
        if self._guesses.get(guess.index) is not guess or guess.routing is None:
            return  # too late, or the device failed
        experts, counts = distinct(guess.routing)
        if len(guess.routing.ids) > 1:
            order = np.argsort(-np.asarray(counts), kind="stable")
            experts = [experts[i] for i in order]
        if self._residency.predicts():
            self._residency.predicted(guess.index, guess.routing)
        elif not self._residency.decoding:
            guess.ahead = experts
        self._copy_ahead(guess.index, experts)

    def _copy_ahead(self, index: int, experts: Sequence[int]) -> None:
        """What the next layer will probably need, and the host has, is copied to its device."""
        place = self._places[index]
        if place.pins(index):
            return
        absent = [e for e in experts if not place.tier.holds(index, e)]
        held = self._store.borrow(index, absent, place.tier.room_ahead(index))
        if held:
            place.tier.copy_ahead(index, held, partial(self._store.give_back, index))

    def fetch_on(self, step: ExpertStep) -> None:
        """When a layer has nothing left to submit, the next one's experts may come."""
        guess = self._guesses.get(step.layer.index + 1)
        if guess and guess.ahead and not step.pending:
            # Nine in ten of what is predicted for a whole step's tokens is picked.
            del guess.ahead[: self._store.prefetch(guess.index, guess.ahead, certain=True)]


class _Guess:
    """What the router of a layer says of a residual stream that is not its own yet."""

    def __init__(self, layer: Layer, x: Any) -> None:
        self.index = layer.parameters.index
        self.routing: Routing | None = None
        self.ahead: list[int] = []  # still to be read for a prompt, the most wanted first
        self._layer, self._x = layer, x

    def do_route(self, place: Place, segments: Sequence[Segment]) -> None:
        """Work for the place's stream."""
        launch = partial(self._layer.route, self._x)
        self.routing = place.ops.fixed_part(self.index, segments, launch, aside=True)
