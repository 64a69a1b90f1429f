"""What a router says, on the device and in the host's mailbox.

Owns: the launches from a layer's input to its picks, and the copy to the host. Does not know: where
experts lie, when the copy has landed (an event after it tells).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fomoe.kernels.device import StandInRule
from fomoe.kernels.gpu.car import select
from fomoe.kernels.gpu.route import pick
from fomoe.kernels.ops import F32Array, I32Array, MoeSpec, Routing


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


@dataclass(slots=True)
class GpuRouting(Routing):
    """`h` is of the device; `ids`, `weights` and `logits` are pinned host memory, valid once an
    event recorded after the route has been reached.

    `device_ids` and `device_weights` [T, top_k] are what the kernels take unless the host has put
    other arrays into `ids` and `weights` than were sent. `picked_ids` and `picked_weights`: what
    the router said where stand-ins were chosen on the device, else the same arrays.
    """

    device_ids: Any
    device_weights: Any
    picked_ids: I32Array
    picked_weights: F32Array
    sent_ids: I32Array
    sent_weights: F32Array
    mailbox: Mailbox


def device_picks(routing: Routing, device: Any) -> tuple[Any, Any]:
    """ids and weights on the device: what the router left there, or what the host put in its
    place."""
    ids, weights = routing.ids, routing.weights
    if (
        isinstance(routing, GpuRouting)
        and ids is routing.sent_ids
        and weights is routing.sent_weights
    ):
        return routing.device_ids, routing.device_weights
    ids, weights = np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(weights, np.float32)
    return to_device(ids, device), to_device(weights, device)


def to_device(array: npt.NDArray[Any], device: Any) -> Any:
    """A copy in device memory, queued on the current stream; the array may change at once."""
    source = torch.from_numpy(array)
    if device.type == "cpu":
        return source.clone()
    # A pinned block of torch's allocator is not used again before the copy is done.
    return source.pin_memory().to(device, non_blocking=True)


class StandIns:
    """Cache-aware routing of one layer on the device: its rule, and what it goes by.

    `available`: uint8 [experts], written by whoever knows which reads would not stall, in the order
    of the stream. The running range of logits starts at zero; `reset` forgets it.
    """

    def __init__(self, rule: StandInRule, available: Any) -> None:
        self.rule = rule
        self.available = available
        terms = (rule.limit, rule.max_mass, rule.range_gain)
        device = available.device
        self._terms = torch.tensor(terms, dtype=torch.float64, device=device)
        self._spread = torch.zeros(1, dtype=torch.float64, device=device)

    def reset(self) -> None:
        self._spread.zero_()

    def select(
        self, spec: MoeSpec, logits: Any, ids: Any, weights: Any, new_ids: Any, new_weights: Any
    ) -> None:
        select(
            self.rule, spec, logits, ids, weights, self.available, self._spread, self._terms,
            new_ids, new_weights,
        )  # fmt: skip


def choose(
    spec: MoeSpec, h: Any, logits: Any, stand_ins: StandIns | None, mailbox: Mailbox | None = None
) -> GpuRouting:
    """Pick from logits float32 [T, experts] on the device, and send all of it to the host: into
    `mailbox`, which an earlier call of the same shapes made, or a new one."""
    tokens, k = len(logits), spec.top_k
    picks = tokens * k
    num_sets = 2 if stand_ins else 1
    # ids, then weights, of every set: one copy to the host.
    device = torch.empty(2 * num_sets * picks, dtype=torch.int32, device=logits.device)
    mailbox = mailbox or Mailbox.like(device, logits)
    sets = [part.view(tokens, k) for part in device.split(picks)]
    ids, weights = sets[0], sets[1].view(torch.float32)
    pick(spec, logits, ids, weights)
    used = ids, weights
    if stand_ins:
        used = sets[2], sets[3].view(torch.float32)
        stand_ins.select(spec, logits, ids, weights, *used)
    mailbox.picks.copy_(device, non_blocking=True)
    mailbox.logits.copy_(logits, non_blocking=True)
    arrays = [part.view(tokens, k).numpy() for part in mailbox.picks.split(picks)]
    host_ids, host_weights = arrays[-2], arrays[-1].view(np.float32)
    return GpuRouting(
        h=h,
        logits=mailbox.logits.numpy(),
        ids=host_ids,
        weights=host_weights,
        device_ids=used[0],
        device_weights=used[1],
        picked_ids=arrays[0] if stand_ins else host_ids,
        picked_weights=arrays[1].view(np.float32) if stand_ins else host_weights,
        sent_ids=host_ids,
        sent_weights=host_weights,
        mailbox=mailbox,
    )
