"""Every kernel compiles for cards that are not here, without spills and with wide loads.

Each kernel with one type for every target, and every type for one of them in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

TARGETS = ("sm_80", "sm_90", "sm_120", "gfx1100", "gfx1200")
KERNELS = (
    "matvec Q4_K", "gate_up Q4_K", "down Q6_K", "combine", "matmul Q6_K", "grouped gate_up Q4_K",
    "grouped down Q6_K", "embed Q4_K",
)  # fmt: skip
LAYERS = (
    "prepare", "rows", "join rows", "tiles", "convolve a token", "convolve a tile", "delta steps",
    "delta solve", "delta chunks", "pick", "stand-ins light", "stand-ins ratio", "stand-ins prior",
    "stand-ins max-rank", "rms_norm", "gated_norm", "activate",
)  # fmt: skip
# Which AMD's cards do with some spills: nobody need have a cache of float32.
NVIDIA = ("rows F32", "tiles F32")
SHARED_BYTES = 64 * 1024  # what every card has
OTHERS = (
    "matvec Q5_K", "matvec Q8_0", "matvec IQ4_XS", "matvec MXFP4", "matvec F32", "matvec Q5_0",
    "matvec F16", "matvec BF16", "down Q4_K",
)  # fmt: skip


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process a target, all at once: compiling needs Triton without its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = {}
    for i, target in enumerate(TARGETS):
        names = (*KERNELS, *LAYERS, *OTHERS[i :: len(TARGETS)])
        names += NVIDIA if target.startswith("sm_") else ()
        only = [argument for name in names for argument in ("--only", name)]
        started[target] = subprocess.Popen(
            [sys.executable, "-P", "-m", "fomoe.kernels.gpu.compile", target, "--json", *only],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(compilers: dict[str, subprocess.Popen[str]], target: str) -> None:
    output, _ = compilers[target].communicate(timeout=600)
    results = json.loads(output[output.index("[\n") :])
    assert len(results) >= len(KERNELS)
    for result in results:
        assert result["spill_bytes"] == 0, result
        assert result["shared_bytes"] <= SHARED_BYTES or result["kernel"] not in LAYERS, result
        loads = {int(size): count for size, count in result["loads"].items()}
        total = sum(size * count for size, count in loads.items())
        assert 16 * loads.get(16, 0) > 0.9 * total or not result["wide"], result
