"""Threads that stand for a device: order within streams, events between them, failures."""

import asyncio
import random
import time

import numpy as np
import pytest

from fomoe.kernels.device_host import HostDevice


@pytest.fixture
def device():
    """A device whose work is slow at random, made inside a running loop by `with_device`."""
    rng = random.Random(0)
    return lambda: HostDevice(pause=lambda: time.sleep(rng.random() * 2e-3))


def with_device(make, main):
    async def run():
        device = make()
        try:
            return await main(device)
        finally:
            device.close()

    return asyncio.run(asyncio.wait_for(run(), 30))


async def reached(device, event):
    done = asyncio.get_running_loop().create_future()
    device.when(event, lambda: done.set_result(None))
    await done
    assert event.done()


def test_a_stream_keeps_its_order_and_runs_beside_the_loop(device):
    async def main(device):
        seen = []
        for i in range(20):
            device.compute.call(lambda i=i: seen.append(i))
        event = device.compute.record()
        assert not event.done()
        await reached(device, event)
        return seen

    assert with_device(device, main) == list(range(20))


def test_streams_meet_in_events(device):
    async def main(device):
        host = device.host_array((8, 16), np.float32)
        host[:] = np.arange(128, dtype=np.float32).reshape(8, 16)
        inside, back = device.array((16,), np.float32), device.host_array((8, 16), np.float32)
        free = device.compute.record()
        for i in range(8):
            device.uploads.wait(free)
            device.uploads.copy(device.address(inside), host[i].ctypes.data, 64)
            device.compute.wait(device.uploads.record())
            device.compute.copy(back[i].ctypes.data, device.address(inside), 64)
            free = device.compute.record()
        await reached(device, free)
        return host, back

    host, back = with_device(device, main)
    np.testing.assert_array_equal(host, back)


def test_a_failure_stops_the_work_and_hangs_nobody(device):
    async def main(device):
        seen = []
        device.compute.call(lambda: 1 / 0)
        device.compute.call(lambda: seen.append(1))
        device.uploads.wait(device.compute.record())
        await reached(device, device.uploads.record())
        return seen, device.failure()

    seen, failure = with_device(device, main)
    assert not seen
    assert isinstance(failure, ZeroDivisionError)


def test_memory_is_aligned_and_zeroed(device):
    async def main(device):
        address = device.allocate(1000)
        array = device.array((3, 5), np.float32)
        assert address % 256 == device.address(array) % 256 == 0
        assert not array.any()
        free, total = device.memory()
        assert 0 < free < total

    with_device(device, main)
