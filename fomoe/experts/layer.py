"""One layer's experts: which are absent, being read or ready, and in which slots.

Owns: the slots of a layer, and the rule that none is given away while the kernel may write to it or
compute may read it. Does not know: when reads are submitted, who waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import numpy as np
import numpy.typing as npt

from fomoe.experts.cache import ExpertCache
from fomoe.experts.layout import ExpertLayout
from fomoe.experts.ledger import Ledger
from fomoe.experts.slots import SlotPool
from fomoe.io.reader import ReadRequest
from fomoe.kernels.ops import Resident as Resident


class LayerExperts:
    """`address` holds the slot of every loading or ready expert, else 0; `ready` those whose bytes
    are there, as compute takes them; `abandoned` those loading of which no more is read than is
    under way; `held` those that a step still has to compute; `transit` those
    in slots that belong to no layer. `table` int64 [experts, 3] has the addresses of those that are
    ready in slots of the layer's own, else zeros."""

    __slots__ = (
        "_ledger", "abandoned", "address", "ahead", "cache", "held", "index", "layout", "loading",
        "pool", "predicted", "ready", "reserve", "table", "transit", "window_ns",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        layout: ExpertLayout,
        pool: SlotPool,
        cache: ExpertCache,
        reserve: int,
        ledger: Ledger,
    ) -> None:
        self.index = index
        self.layout = layout
        self.pool = pool
        self.cache = cache
        self.reserve = reserve  # transit slots that reads ahead leave to the step at hand
        self.window_ns = 0.0  # a running mean of how long a step computes before it has to wait
        self.address = [0] * layout.num_experts
        self.ready: dict[int, Resident] = {}
        self.table: npt.NDArray[np.int64] = np.zeros((layout.num_experts, 3), np.int64)
        self.loading: dict[int, ReadRequest] = {}
        self.abandoned: set[int] = set()
        self.transit: set[int] = set()
        self.held: set[int] = set()
        self.ahead: set[int] = set()
        self.predicted: list[int] = []
        self._ledger = ledger

    def _busy(self) -> list[int]:
        """Experts whose slots the kernel may write to or compute may read."""
        return [*self.held, *self.loading]

    def take_slot(self, expert: int, *, newcomer: bool) -> int | None:
        """A slot of the layer's own to read an expert into: one that it may still fill, or that of
        an expert evicted for it. With `newcomer` an expert is evicted only for one that the policy
        values more, and never one that is predicted."""
        cache = self.cache
        if len(cache) < cache.capacity:
            slot = self.pool.take()
            cache.admit(expert, slot)
            return slot
        protected = self._busy()
        if newcomer:
            protected += self.predicted
        victim = cache.victim(protected, newcomer=expert if newcomer else None)
        if victim is None:
            return None
        slot = self._evict(victim)
        cache.admit(expert, slot)
        return slot

    def take_transit(self, expert: int, reserve: int = 0) -> int | None:
        """A slot that belongs to no layer, while more than `reserve` of those are free."""
        slot = self.pool.take_transit(reserve)
        if slot is not None:
            self.transit.add(expert)
        return slot

    def load(self, expert: int, slot: int, request: ReadRequest) -> None:
        """The expert is being read into the slot."""
        self.address[expert] = slot
        self.loading[expert] = request

    def land(self, expert: int) -> None:
        """The expert's bytes are in its slot."""
        addresses = self.layout.addresses(expert, self.address[expert])
        self.ready[expert] = (expert, *addresses)
        if expert not in self.transit:
            self.table[expert] = addresses

    def release(self, experts: Iterable[int], *, keep: bool, newcomers: bool) -> None:
        """Compute is done with these experts. One in transit goes, or with `keep` takes the slot of
        the one that deserves it least, `newcomers` only if they deserve it more."""
        self.held.difference_update(experts)
        if not self.transit:
            return
        for expert in [e for e in experts if e in self.transit]:
            newcomer = expert if newcomers else None
            victim = self.cache.victim(self._busy(), newcomer) if keep else None
            if victim is None:
                self.forget(expert)
            else:
                self.pool.give_transit(self._evict(victim))
                self.transit.remove(expert)
                self.cache.admit(expert, self.address[expert])
                self.table[expert] = self.ready[expert][1:]

    def drop_transit(self, wanted: Set[int] = frozenset()) -> None:
        """Give back transit slots of experts that are ready and not wanted."""
        for expert in [e for e in self.transit if e not in wanted and e not in self.loading]:
            self.forget(expert)

    def forget(self, expert: int) -> None:
        """A slot goes back to its pool without its expert being kept."""
        slot = self.address[expert]
        self.address[expert] = 0
        self.ready.pop(expert, None)
        self.table[expert] = 0
        self._ledger.note_eviction(self.index, expert)
        if expert in self.transit:
            self.transit.remove(expert)
            self.pool.give_transit(slot)
        else:
            self.cache.evict(expert)
            self.pool.give(slot)

    def _evict(self, victim: int) -> int:
        slot = self.address[victim]
        assert slot
        assert victim not in self.held
        del self.ready[victim]
        self.table[victim] = 0
        self.address[victim] = 0
        self.cache.evict(victim)
        self._ledger.note_eviction(self.index, victim)
        return slot
