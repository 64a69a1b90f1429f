"""Where an expert is computed that is in host memory and not on the layer's device: there, after a
copy, or by the processor where it lies.

Owns: the cost model. Does not know: slots, copies, threads; it works on seconds.

Copies and the processor work side by side, each through a queue of its own. An expert goes where it
will be finished first, the one with the most tokens first: a copy costs the same for any number of
them (Fiddler's rule, 2402.07033, with HybriMoE's queues, 2504.05897).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["device", "host"]
# Steps of up to this many tokens are decode to `fixed`.
_FEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that one expert of a layer takes: its copy to the device; on the processor, whatever
    the number of tokens that picked it, and for each of them. Measured when the engine is opened.
    """

    copy_s: float
    host_s: float
    host_token_s: float

    def host(self, tokens: int) -> float:
        return self.host_s + tokens * self.host_token_s


class LayerPlacement:
    """One layer of one step. `pinned`: all of its experts are computed there. `fixed`: nothing that
    was measured decides: experts of small steps are computed by the processor, others copied."""

    def __init__(
        self, costs: Costs, *, pinned: Side | None = None, fixed: bool = False, tokens: int = 1
    ) -> None:
        self._costs = costs
        self._pinned = pinned
        if pinned is None and fixed:
            self._pinned = "host" if tokens <= _FEW_TOKENS else "device"
        self._copies_s = 0.0  # until the copies that were decided on are done
        self._host_s = 0.0  # and what the processor was given

    def split(
        self, experts: Sequence[int], tokens: Callable[[int], int]
    ) -> tuple[list[int], list[int]]:
        """Of these experts, `tokens` of each, those for the device and those for the processor;
        call again with what lands later."""
        if self._pinned is not None:
            return (list(experts), []) if self._pinned == "device" else ([], list(experts))
        device, host = [], []
        for expert in sorted(experts, key=lambda e: (-tokens(e), e)):
            copied = self._copies_s + self._costs.copy_s
            computed = self._host_s + self._costs.host(tokens(expert))
            if computed < copied:
                self._host_s = computed
                host.append(expert)
            else:
                self._copies_s = copied
                device.append(expert)
        return device, host
