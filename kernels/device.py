"""A device that computes and has memory of its own: the seam between the engine and CUDA, HIP, or
threads of the host that stand for one.

Owns: the signatures. Does not know: models, experts, which device runs.

Work on a device is queued on streams. A stream does its work in order; streams meet in events only.
What is queued may run at any later time, so memory that queued work reads or writes stays as it is
until an event recorded after the work has been reached. All methods are called on the event loop's
thread, `close` included, and none of them waits for the device.

Host and device meet in host memory: an array of `host_array` (pinned where that can be had) that a
stream copies into is valid on the host once an event recorded after the copy has been reached. That
is the mailbox of a router: `ids`, `weights` and `logits` of the Routing that a device's Ops.route
returns are such arrays, while its kernels take the device's own ids. So the experts that are in the
device's memory are launched straight from a table, the host reads the mailbox meanwhile, and only a
miss makes the device wait for the host. Stand-ins for picks whose reads would stall are chosen
there, too: the kernels need them as soon as the picks. Of what would stall a device knows what the
host wrote into its memory before the layer's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fomoe.kernels.ops import A, F32Array, I32Array, MoeCall, MoeSpec, Ops, Routing, Segment, W
from fomoe.kernels.table import QuantType

R = TypeVar("R")
# Stand-ins for one layer's picks: (logits [T, experts], ids and weights [T, k], available bool
# [experts], the rule's limit) -> ids and weights of what is to be computed.
Choose = Callable[
    [F32Array, I32Array, F32Array, npt.NDArray[np.bool_], float], tuple[I32Array, F32Array]
]
# In what stand-ins are chosen by, the bytes before those of experts: the limit, float64, padded so
# that the others are aligned.
LIMIT_BYTES = 16

# Device memory is given out in multiples of this, and so is every matrix of an expert in a slot:
# 16-byte loads are legal wherever block sizes allow them.
DEVICE_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInRule:
    """Cache-aware routing as a device's router applies it: CarOptions in numbers.

    range_gain: what a token's own range of logits counts in the running one. `policy` makes the
    same rule for one layer, for a device that is a processor.
    """

    policy: Callable[[], Choose]
    rule: str  # light, ratio, prior or max-rank
    top_j: int
    max_rank: int
    max_mass: float
    renorm: bool
    range_gain: float


class Event(Protocol):
    """A point in a stream's work. Reached once all work queued before it has been done."""

    def done(self) -> bool:
        """Whether it has been reached; does not wait."""


class Stream(Protocol):
    """Work in order, on one device."""

    def call(self, work: Callable[[], object]) -> None:
        """Queue work. On a GPU `work` is called now, and what it launches and copies is queued; on
        the host it is called later, by the stream's thread. What it returns is dropped."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy between any two addresses, of this device, another one, or the host."""

    def record(self) -> Event:
        """An event after all work queued so far."""

    def wait(self, event: Event) -> None:
        """Work queued from here on begins after the event, whose stream may be another device's."""


class DeviceMoeCall(MoeCall, Protocol):
    """MoeCall of a device. Addresses are of its memory; run() may come after run_table()."""

    def run_table(self, table: A) -> None:
        """Compute every pick whose expert is in `table`, as the table is when this work's turn
        comes: int64 [experts, 3] in device memory, the addresses of gate, up and down, or zeros."""

    def finish_some(self, x: A) -> None:
        """As finish, with the picks that run() and run_table() computed: the processor has the
        others, and its sum is added to x."""


class DeviceOps(Ops, Protocol):
    """The operations of a device. Each queues its work on the stream that calls it, and may be
    called from one `Stream.call` at a time."""

    def fixed_part(
        self,
        key: Hashable,
        segments: Sequence[Segment],
        launch: Callable[[], R],
        *,
        aside: bool = False,
    ) -> R:
        """Queue what `launch` queues by calling these operations, and return what it returned: a
        backend may record it under `key` for steps of the same shape, and play it back, returning
        the very same objects. So nothing in it is decided by the host. What a short step's fixed
        part makes is good until the same key comes again on the host, and until the next fixed
        part on the device; one that is `aside` leaves the others' alone."""

    def stand_ins(self, spec: MoeSpec, rule: StandInRule, offered: A) -> Any:
        """Cache-aware routing of one layer, for route(). `offered`: uint8 [LIMIT_BYTES + experts]
        in device memory, the rule's limit (CarOptions.limit) and then 1 where an expert's use would
        not stall; read when the work's turn comes."""

    def route(
        self, spec: MoeSpec, x: A, norm: A, eps: float, router: W, stand_ins: Any = None
    ) -> Routing:
        """As in Ops; ids, weights and logits are the host's mailbox. The arrays are no other call's
        (but for those of fixed_part). With `stand_ins` they are what is to be computed, and
        `picked` is what the router said."""

    def moe(
        self, spec: MoeSpec, routing: Routing, shared: tuple[W, W, W, W | None] | None
    ) -> DeviceMoeCall:
        """As in Ops, for a routing of this device: its own ids and weights are taken, without
        waiting for the host."""

    def reads(self, tensor_type: QuantType) -> bool:
        """Whether there are kernels for matrices of the type, of embedding rows, too."""

    @property
    def reserve(self) -> Callable[..., None]:
        """Allocates scratch for shapes, given as CpuOps.reserve has them."""

    def close(self) -> None:
        """Let go of threads and arrays; the device is idle."""


class Device(Protocol):
    """One device: "cuda:0", or "cpu" for threads that stand for one."""

    name: str
    shares_memory: bool  # its kernels can read host memory as fast as their own
    recorded_bytes: int  # of its memory that a layer's recorded work takes (DeviceOps.fixed_part)
    poll_ns: int  # for so long asking an event again and again is quicker than being called back

    @property
    def compute(self) -> Stream:
        """For kernels, and small copies that they wait for."""

    @property
    def aside(self) -> Stream:
        """For short kernels that no others wait for, beside those of `compute`: only fixed parts
        that are `aside` (DeviceOps.fixed_part). It may be `compute` itself."""

    @property
    def uploads(self) -> Stream:
        """For copies from host memory, beside the kernels."""

    @property
    def downloads(self) -> Stream:
        """For copies to host memory: a link carries both ways at once."""

    def allocate(self, nbytes: int) -> int:
        """The address of memory of the device, aligned to DEVICE_ALIGNMENT, its own until close.
        Raises MemoryError."""

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> A:
        """An array of zeros in device memory, of the kind that the device's Ops take."""

    def host_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of zeros in host memory that copies run at full speed with."""

    def address(self, array: A) -> int:
        """Where an array of array() (or a contiguous part of one) starts."""

    def pin(self, address: int, nbytes: int) -> None:
        """Let copies from this host memory run at full speed and without the host; any thread may
        call it. Raises OSError where the system refuses; copies work all the same."""

    def unpin(self) -> None:
        """Undo every pin(), before the memory is given back. Nothing may be queued."""

    def when(self, event: Event, callback: Callable[[], None]) -> None:
        """Call back on the event loop, soon after the event has been reached."""

    def synchronize(self) -> None:
        """Wait until all that was queued, on whatever stream, has been done: while loading, never
        between tokens."""

    def failure(self) -> BaseException | None:
        """What went wrong in queued work, for good."""

    def mark(self, key: Hashable) -> Event:
        """An event for reach(). Where work is recorded (DeviceOps.fixed_part) it is the same one
        whenever the key is, and stands for the latest time that the work was queued."""

    def reach(self, event: Event) -> None:
        """From inside queued work: the event of mark() is at this point of it. It may be waited for
        once the work has been queued."""

    def move(self, target: Any, source: Any) -> None:
        """From inside queued work: copy between an array of array() and one of host_array(), of one
        shape and type, in order with that work."""

    def assign(self, target: A, source: A) -> None:
        """From inside queued work: copy between two arrays of array()."""

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory: free now, in all."""

    def make_ops(self, *, threads: int, max_tokens: int, isa: str) -> DeviceOps:
        """The device's operations, for steps of up to `max_tokens`; `threads` and `isa` are for a
        device that is a processor."""

    def workspace_bytes(self, ops: DeviceOps, **shapes: Any) -> int:
        """What those operations of its own take of the device's memory; `shapes` as
        CpuOps.workspace_bytes has them."""

    def close(self) -> None:
        """Give all memory back. Nothing may be queued."""
