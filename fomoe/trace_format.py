"""The format of a recording: a head, a description, and fixed-size records.

Owns: what a record says, and in which bytes. Does not know: who writes (trace.py) or reads
(`fomoe.tracing`).
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

MAGIC: Final = b"fomoeTRC"
VERSION: Final = 1
HEADER_BYTES: Final = 1 << 16  # fixed head, then the description as JSON
HEAD: Final = struct.Struct("<8sIIIIQQ")  # magic, version, header, record, json bytes, slots, total
RECORD: Final = struct.Struct("<qqqqiihHI")
PICKS: Final = struct.Struct("<qq8HiihHI")  # a and b as eight picks
PARTS: Final = struct.Struct("<qqIIIIiihHI")  # a, b and expert as five durations
RECORD_BYTES: Final = RECORD.size
RECORD_TYPE: Final = np.dtype(
    [
        ("begin", "<i8"),  # time.perf_counter_ns
        ("end", "<i8"),
        ("a", "<i8"),
        ("b", "<i8"),
        ("token", "<i4"),
        ("expert", "<i4"),
        ("layer", "<i2"),
        ("kind", "<u2"),
        ("serial", "<u4"),  # 1 for the first record, modulo 2**32; 0 marks a slot never written
    ]
)

Records = npt.NDArray[np.void]  # of RECORD_TYPE


class Kind(enum.IntEnum):
    """What a record tells. `token` is the number of tokens the engine had computed when the step
    began, so that differences count tokens. Whatever does not apply stays -1 (or 0 for a, b).

    Reads land when the event loop sees it: one that lands while the loop's own thread computes is
    seen when that ends, so times in flight are upper bounds there.
    """

    STEP = 1  # one forward of the model: a tokens, b = 1 prompt, 0 decode
    LAYER = 2  # one layer of a step, experts included
    COMPUTE = 3  # one stretch of computing: a = Part, b = number of experts in it
    STALL = 4  # nothing to compute until a read lands: expert = the one that ended it, a = Reason
    READ = 5  # compute waits for it: begin = queued, end = landed, a bytes, b ns until submitted
    PREFETCH = 6  # like READ, in the background: predicted, displaced, or warm start
    USE = 7  # an expert computed in a step: a = tokens that picked it, b = Source
    EVICT = 8  # an expert left its slot
    PREDICT = 9  # begin = predicted, end = routed, a = experts predicted, b = of them picked
    SUBSTITUTE = 10  # `expert` was replaced by expert a; b = probability moved, in millionths
    # What is written for the most frequent events, and read back as the plain records above:
    LAYER_PARTS = 11  # LAYER without stalls, with the nanoseconds of COMPACT_PARTS
    COPY = 13  # an expert's copy to a device: begin = queued, a bytes, b = device * 2 + 1 if ahead
    PICKS = 12  # USEs of one token, eight a record: expert * 4 + Source, or NO_PICK


class Part(enum.IntEnum):
    """Which computing a COMPUTE record is about."""

    EMBED = 1
    MIX = 2  # attention or delta-net, with its norms and projections
    ROUTE = 3
    RESIDENT = 4  # experts that were in memory
    LANDED = 5  # experts computed as their reads landed
    SHARED = 6
    FINISH = 7
    HEAD = 8
    SAMPLE = 9
    DENSE = 10  # the feed-forward of a layer without experts


class Source(enum.IntEnum):
    """Where a used expert was when the router picked it."""

    RESIDENT = 0
    MISSING = 1
    IN_FLIGHT = 2  # being read already: predicted, but not in time to be resident


class Reason(enum.IntEnum):
    """Why compute had to wait, where the engine knows; UNKNOWN is worked out from the records."""

    UNKNOWN = 0
    COLD = 1  # never read before
    EVICTED = 2
    LATE = 3  # predicted, but the read was under way when it was needed
    QUEUED = 4  # most of the wait was behind other reads
    FILE = 5  # another read than an expert's, such as embedding rows


COMPACT_PARTS: Final = (Part.MIX, Part.ROUTE, Part.RESIDENT, Part.SHARED, Part.FINISH)
NO_PICK: Final = 0xFFFF
# What a record may say at most: 14 bits name a pick, and no model has half as many layers. Times
# are below 2**62, so that differences of two fit 64 bits.
MAX_EXPERTS: Final = NO_PICK >> 2
MAX_LAYERS: Final = 1 << 10
MAX_NS: Final = 1 << 62
