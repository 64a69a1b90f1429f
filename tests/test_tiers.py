"""tools/tiers: copies back add to what is hit, and to no more than all slots in one tier would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

TIERS = Path(__file__).parents[1] / "tools" / "tiers"
EXPERTS, K = 40, 4


def test_command_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    liked = rng.normal(0, 1, (2, EXPERTS))
    logits = liked + rng.normal(0, 1, (400, *liked.shape))
    tokens = np.argsort(-logits, axis=2)[..., :K]
    np.savez(tmp_path / "drift.npz", trace0=tokens.astype(np.int32))
    done = subprocess.run(
        [sys.executable, TIERS, tmp_path / "drift.npz", "--device", "20%", "--memory", "20%"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "8 and 8 of 40 experts" in done.stdout
    given_up, copied_back, one = (float(x) for x in re.findall(r"read +([\d.]+)%", done.stdout))
    assert given_up > copied_back >= one - 1.0
