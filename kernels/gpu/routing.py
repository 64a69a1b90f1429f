"""What a router says, on the device and in the host's mailbox.

Owns: the launches from logits to what is to be computed, and the copy to the host. Does not know:
where experts lie, when the copy has landed (an event after it tells).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.device import LIMIT_BYTES, StandInRule
from fomoe.kernels.gpu.car import select
from fomoe.kernels.gpu.route import pick
from fomoe.kernels.ops import MoeSpec, Routing


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Pinned host memory: `picks` int32 (ids, then weights, of every set of them), `logits`
    float32 [T, experts]. A block of torch's allocator is not used again before copies into it are
    done."""

    picks: Any
    logits: Any

    @staticmethod
    def like(picks: Any, logits: Any) -> Mailbox:
        made = (torch.empty_like(a, device="cpu", pin_memory=a.is_cuda) for a in (picks, logits))
        return Mailbox(*made)

    def clear(self) -> None:
        """Forget what came last: an expert that is none shows who reads it too early."""
        self.picks.numpy()[0] = -1


@dataclass(slots=True, kw_only=True)
class GpuRouting(Routing):
    """`h` is of the device; `ids`, `weights`, `picked` and `logits` are pinned host memory, valid
    once an event recorded after the route has been reached. `device_ids` and `device_weights`
    [T, top_k]: what the kernels take."""

    device_ids: Any
    device_weights: Any
    mailbox: Mailbox


def to_device(array: npt.NDArray[Any], device: Any) -> Any:
    """A copy in device memory, queued on the current stream; the array may change at once."""
    source = torch.from_numpy(array)
    if device.type == "cpu":
        return source.clone()
    # A pinned block of torch's allocator is not used again before the copy is done.
    return source.pin_memory().to(device, non_blocking=True)


class StandIns:
    """Cache-aware routing of one layer on the device: its rule, and what it goes by.

    `offered`: as DeviceOps.stand_ins has it, written by whoever knows which reads would not stall,
    in the order of the stream.
    """

    def __init__(self, rule: StandInRule, offered: Any) -> None:
        self.rule = rule
        self._limit = offered[:LIMIT_BYTES].view(torch.float64)[:1]
        self._available = offered[LIMIT_BYTES:]
        terms = (rule.max_mass, rule.range_gain)
        device = offered.device
        self._terms = torch.tensor(terms, dtype=torch.float64, device=device)
        self._spread = torch.zeros(1, dtype=torch.float64, device=device)

    def select(
        self, spec: MoeSpec, logits: Any, ids: Any, weights: Any, new_ids: Any, new_weights: Any
    ) -> None:
        select(
            self.rule, spec, logits, ids, weights, self._available, self._limit, self._spread,
            self._terms, new_ids, new_weights,
        )  # fmt: skip


def room(spec: MoeSpec, tokens: int) -> int:
    """Words of 4 bytes that `choose` needs on the device."""
    return 4 * tokens * spec.top_k


def choose(
    spec: MoeSpec,
    h: Any,
    logits: Any,
    stand_ins: StandIns | None,
    words: Any,
    mailbox_like: Callable[[Any, Any], Mailbox] = Mailbox.like,
) -> GpuRouting:
    """Pick from logits float32 [T, experts] on the device, and send all of it to the host: into
    `mailbox_like` of it, which may be one that was used before. `words`: int32, `room` of them, on
    the device; what is to be computed comes first, and stays there."""
    tokens, picks = len(logits), len(logits) * spec.top_k
    used = words[: (4 if stand_ins else 2) * picks]  # one copy to the host
    mailbox = mailbox_like(used, logits)
    sets = [part.view(tokens, spec.top_k) for part in used.split(picks)]
    ids, weights = sets[0], sets[1].view(torch.float32)
    if stand_ins is None:
        pick(spec, logits, ids, weights)
    else:
        picked = sets[2], sets[3].view(torch.float32)
        pick(spec, logits, *picked)
        stand_ins.select(spec, logits, *picked, ids, weights)
    mailbox.picks.copy_(used, non_blocking=True)
    mailbox.logits.copy_(logits, non_blocking=True)
    arrays = [part.view(tokens, spec.top_k).numpy() for part in mailbox.picks.split(picks)]
    return GpuRouting(
        h=h,
        logits=mailbox.logits.numpy(),
        ids=arrays[0],
        weights=arrays[1].view(np.float32),
        picked=(arrays[2], arrays[3].view(np.float32)) if stand_ins else None,
        device_ids=ids,
        device_weights=weights,
        mailbox=mailbox,
    )
