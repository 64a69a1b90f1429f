"""The CUDA device against a runtime that is made up: calls, wake-ups, pinning, what is undone."""

import asyncio
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from fake_cuda import fake_library, install  # noqa: E402

from fomoe.errors import RequestError, UnsupportedError  # noqa: E402
from fomoe.kernels.device_cuda import CudaDevice  # noqa: E402
from fomoe.kernels.device_runtime import Runtime  # noqa: E402
from fomoe.kernels.open_device import open_device  # noqa: E402


@pytest.fixture
def cuda(monkeypatch):
    install(monkeypatch)
    return fake_library()


def with_device(library, main):
    async def run():
        place = torch.device("cpu")
        device = CudaDevice("cuda:0", 0, place=place, runtime=Runtime("cuda", library))
        try:
            return await main(device)
        finally:
            device.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


async def reached(device, stream):
    event, done = stream.record(), asyncio.get_running_loop().create_future()
    device.when(event, lambda: done.set_result(None))
    assert not done.done()
    await done
    assert event.done()


def test_the_loop_is_woken_for_each_event(cuda):
    async def main(device):
        seen = []
        for i in range(5):
            device.when(device.compute.record(), lambda i=i: seen.append(i))
            device.when(device.uploads.record(), lambda i=i: seen.append(-i))
        await reached(device, device.compute)
        await reached(device, device.uploads)
        return seen

    seen = with_device(cuda, main)
    assert [i for i in seen if i > 0] == [1, 2, 3, 4]
    assert [i for i in seen if i < 0] == [-1, -2, -3, -4]
    assert seen.count(0) == 2


def test_arrays_copies_and_moves(cuda):
    async def main(device):
        host = device.host_array((3, 4), np.float32)
        host[:] = np.arange(12).reshape(3, 4)
        inside = device.array((3, 4), np.float32)
        assert not inside.any()
        device.uploads.copy(device.address(inside), host.ctypes.data, host.nbytes)
        back = device.host_array((3, 4), np.float32)
        device.compute.wait(device.uploads.record())
        device.compute.call(lambda: device.move(back, inside))
        await reached(device, device.compute)
        np.testing.assert_array_equal(back, host)
        assert device.allocate(1000) % 256 == 0
        assert device.memory() == (1 << 30, 2 << 30)
        assert device.array((2,), np.int64).dtype == torch.int64
        assert device.array((2,), np.uint8).dtype == torch.uint8
        assert device.array((2,), np.float16).dtype == torch.float16

    with_device(cuda, main)
    assert cuda.copies == [48]
    assert not cuda.pinned  # what was pinned was given back


def test_memory_is_pinned_once_and_unpinned(cuda):
    async def main(device):
        memory = np.zeros(8192, np.uint8)
        device.pin(memory.ctypes.data, 8192)
        device.pin(memory.ctypes.data, 8192)  # by another device of the same process, say
        assert cuda.pinned == {memory.ctypes.data: 8192}
        device.unpin()
        assert not cuda.pinned

    with_device(cuda, main)


def test_refused_pinning_is_told(monkeypatch):
    install(monkeypatch)

    async def main(device):
        with pytest.raises(OSError, match="out of memory"):
            device.pin(4096, 4096)

    with_device(fake_library(refuse_pinning=True), main)


def test_names_that_are_no_device():
    for name in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(RequestError, match="write cpu, cuda:0"):
            open_device(name)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="sees no GPU"):
        open_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnsupportedError, match="there are 1 GPUs"):
        open_device("cuda:1")
    with pytest.raises(UnsupportedError, match="built for CUDA: use cuda:0"):
        open_device("hip")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match="there is no triton: tools/setup gpu"):
        open_device("cuda")


@pytest.mark.parametrize(("hip", "external"), [("6.4.43482", False), ("7.1.0", True), (None, True)])
def test_what_graphs_need_is_looked_for_once(cuda, monkeypatch, caplog, hip, external):
    monkeypatch.setattr(torch.version, "hip", hip)

    async def main(device):
        return device.mark(1).event.external

    assert with_device(cuda, main) == external
    lines = [record.message for record in caplog.records]
    assert len(lines) == (not external)
    if lines:
        assert "ROCm 6.4.43482 has no external events, 7.0 has: kernels are launched" in lines[0]
