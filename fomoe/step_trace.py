"""What a recording is told of a step: its waits, what was computed, how predictions came out.

Owns: the stretches of computing of the layer at hand. Does not know: what is computed, or how a
recording is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fomoe.trace import Stretch, Tracer
from fomoe.trace_format import Kind, Part, Reason

# (layer, when, experts) that were predicted last
_NOTHING_PREDICTED: tuple[int, int, list[int]] = (-1, 0, [])


class StepTrace:
    """Nothing is told where there is no tracer. `clock` gives the tokens that were computed. Times
    are of time.perf_counter_ns."""

    def __init__(self, tracer: Tracer | None, clock: Callable[[], int]) -> None:
        self.on = tracer is not None
        self._tracer = tracer
        self._clock = clock
        self._predicted = _NOTHING_PREDICTED
        self._stretches: list[Stretch] = []

    def begin(self) -> None:
        """A step begins; the one before may have been given up."""
        self._stretches.clear()

    def end(self, begin: int, num_tokens: int, *, is_prompt: bool) -> None:
        """The step that began then has computed so many tokens."""
        if self._tracer is None:
            return
        end, clock = time.perf_counter_ns(), self._clock() - num_tokens
        self._tracer.flush()
        self._tracer.event(Kind.STEP, begin, end, token=clock, a=num_tokens, b=is_prompt)

    def read(self, begin: int, end: int) -> None:
        """The step has waited for another read than an expert's."""
        if self._tracer:
            self._tracer.event(Kind.STALL, begin, end, token=self._clock(), a=Reason.FILE)

    def computed(self, part: Part, layer: int, begin: int, experts: int = 0) -> None:
        """A stretch of computing (or of waiting for a device that computes) ends now. `layer` is -1
        outside of layers."""
        if self._tracer is None:
            return
        end = time.perf_counter_ns()
        if layer < 0:
            self._tracer.event(Kind.COMPUTE, begin, end, -1, -1, self._clock(), part)
        else:
            self._stretches.append((part, layer, begin, end, experts))

    def layer_begun(self, index: int, marks: Sequence[int], begun_ns: int) -> None:
        """How a layer began: `marks` as of LayerOps."""
        _, _, summed, mixed, routed = marks
        self._stretches.append((Part.MIX, index, summed, mixed, 0))
        self._stretches.append((Part.ROUTE, index, mixed, routed, 0))
        self._stretches.append((Part.SHARED, index, routed, begun_ns, 0))

    def layer_ended(
        self, index: int, marks: Sequence[int], part: Part, experts: int, begin_ns: int
    ) -> None:
        """How it ended: the first three of the next layer's marks."""
        begun, ran, summed = marks[:3]
        self._stretches.append((part, index, begun, ran, experts))
        self._stretches.append((Part.FINISH, index, ran, summed, 0))
        self.layer(index, begin_ns, summed)

    def layer(self, index: int, begin: int, end: int) -> None:
        """A layer, with all that was computed of it."""
        if self._tracer:
            self._tracer.layer(begin, end, index, self._clock(), self._stretches)
            self._stretches = []

    def predicted(self, index: int, experts: list[int]) -> None:
        """A layer will probably pick these."""
        self._predicted = (index, time.perf_counter_ns(), experts)

    def picked(self, index: int, experts: Sequence[int]) -> None:
        """It picked these."""
        layer, begin, predicted = self._predicted
        if self._tracer and layer == index:
            now, right = time.perf_counter_ns(), len(set(predicted).intersection(experts))
            clock, count = self._clock(), len(predicted)
            self._tracer.event(Kind.PREDICT, begin, now, index, -1, clock, a=count, b=right)
            self._predicted = _NOTHING_PREDICTED
