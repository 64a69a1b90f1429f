"""What must be known of a kernel to compile it for a card that is not here.

Owns: the record. Does not know: which kernels there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel with the types of its arguments ("*u8": bytes, 16-byte aligned) and its constants.

    `wide`: nearly all that it loads can be loaded 16 bytes at a time.
    """

    name: str
    function: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    wide: bool
    stages: int = 2
