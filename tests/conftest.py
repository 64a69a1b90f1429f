"""What must be decided before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

# Triton reads this when it is imported: without a GPU its kernels run in its interpreter.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
