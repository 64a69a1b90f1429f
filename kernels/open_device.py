"""A device by its name.

Owns: the names, what people call the devices, and what is missing where one cannot be had. Does not
know: models.
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


def backend_name(name: str) -> str:
    """What llama-bench calls the backend of the device of that name."""
    return {"cuda": "CUDA", "hip": "ROCm"}.get(name.partition(":")[0], "CPU")


def card_name(name: str) -> str | None:
    """What the maker calls the card of that name, which is open; None for the processor."""
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_name(int(number or "0")))
