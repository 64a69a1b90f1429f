"""A device by its name.

Owns: the names, and what is missing where a device cannot be had. Does not know: models.
"""

from __future__ import annotations

from fomoe.errors import RequestError, UnsupportedError
from fomoe.kernels.device import Device
from fomoe.kernels.device_host import HostDevice


def open_device(name: str) -> Device:
    """A device named "cpu" (threads that stand for one), "cuda", "cuda:1", or "hip:0" for an AMD
    card. Called on the event loop that is to use it.

    Raises RequestError for another name, UnsupportedError where torch, triton or the card is not to
    be had; the message says what would help.
    """
    kind, _, number = name.partition(":")
    if name == "cpu":
        return HostDevice()
    if kind not in ("cuda", "hip") or not (number or "0").isdigit():
        raise RequestError(f"--device {name}: write cpu, cuda:0, or hip:0 for an AMD card")
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"--device {name} needs torch and triton, and there is no {error.name}: tools/setup gpu"
            " (for AMD: torch from the ROCm index first), or use --device cpu"
        ) from error
    number = number or "0"
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"--device {name}: torch {torch.__version__} sees no GPU. Check the driver (nvidia-smi,"
            " rocminfo) and that torch is built for it, or use --device cpu"
        )
    if (kind == "hip") != (torch.version.hip is not None):
        built = "ROCm: use hip" if torch.version.hip else "CUDA: use cuda"
        raise UnsupportedError(f"--device {name}: this torch is built for {built}:{number}")
    if int(number) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
        )
    from fomoe.kernels.device_cuda import CudaDevice

    return CudaDevice(name, int(number))
