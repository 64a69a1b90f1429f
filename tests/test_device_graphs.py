"""What a token queues on a GPU whose graphs are made up: one for each layer where no expert is
missing, and the same numbers as without graphs in any case."""

import asyncio
import contextlib
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from toy import Toy, write_toy

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from fake_cuda import fake_library, install  # noqa: E402
from fake_graphs import graphs  # noqa: E402

import fomoe  # noqa: E402
from fomoe import Engine  # noqa: E402
from fomoe.experts.car import CacheAwareRouter  # noqa: E402
from fomoe.experts.car_options import CarOptions  # noqa: E402
from fomoe.experts.placement import Costs  # noqa: E402
from fomoe.kernels.device_cuda import CudaDevice  # noqa: E402
from fomoe.kernels.device_runtime import Runtime  # noqa: E402
from fomoe.kernels.gpu.fixed import Beside  # noqa: E402
from fomoe.kernels.gpu.moe_call import GpuMoeCall  # noqa: E402
from fomoe.places import Place  # noqa: E402
from fomoe.residency import Residency  # noqa: E402

TOY = Toy(
    hidden=32, layers=2, recurrent_layers=(True, False), experts=4, top_k=2, ff=32, heads=2,
    kv_heads=1, shared_ff=32, head_dim=32, k_heads=1, v_heads=2, state_dim=32, vocab=290,
)  # fmt: skip
OPTIONS = {"context": 64, "ubatch": 16, "threads": 2, "cache_type": "f32", "device": "cuda:0"}
IDS = [5, 17, 5, 17, 5]
DECIDE = ("pick_kernel", "select_kernel")


@pytest.fixture
def model(tmp_path):
    """A toy model with some of its shape changed."""
    return lambda **changes: write_toy(tmp_path / "toy.gguf", replace(TOY, **changes))


@pytest.fixture
def cuda(monkeypatch):
    install(monkeypatch)
    library = fake_library()

    def opened(name):
        return CudaDevice(name, 0, place=torch.device("cpu"), runtime=Runtime("cuda", library))

    async def costs(device, helper, layers, *memory):
        return {p.index: Costs(1e-9, 1.0, 1.0) for p, _ in layers}

    library.waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", library.waits.append)
    monkeypatch.setattr("fomoe.fleet.open_device", opened)
    monkeypatch.setattr("fomoe.fleet.measure_costs", costs)
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 300 << 20)
    return library


def run(main):
    return asyncio.run(asyncio.wait_for(main, 300))


async def feed(engine, ids, before_each=lambda: None):
    """Logits after each id, one by one."""
    rows = []
    async for row in engine.feed([[i] for i in ids], max_tokens=len(ids)):
        rows.append(np.array(row))
        before_each()
    return np.stack(rows)


def products(x, weights, outs, add=False):
    """In place of kernels that do nothing: what they would leave could be anything."""
    for out in outs:
        out.normal_()


async def least(model, option, **options):
    with pytest.raises(fomoe.BudgetError) as refusal:
        await Engine.open(model, **{option: 1 << 16}, **options)
    return int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20


@pytest.mark.slow
def test_graphs_change_nothing(model, cuda, monkeypatch):
    """Nor where the processor computes what is missing, and it is on the device from then on."""
    path = model()

    async def logits():
        async with Engine.open(path, deterministic=True, **OPTIONS) as engine:
            return await feed(engine, IDS)

    async def main():
        plain = await logits()
        with graphs(monkeypatch) as log:
            return plain, await logits(), log.names.count("graph")

    plain, recorded, played = run(main())
    np.testing.assert_array_equal(recorded, plain)
    assert played >= (len(IDS) - 2) * TOY.layers


@pytest.mark.parametrize("devices", ["cuda:0", "cuda:0,cuda:0"])
def test_a_token_without_misses_is_one_graph(model, cuda, monkeypatch, devices):
    """Where devices take turns it is one a layer."""
    path = model(layers=3, recurrent_layers=(True, False, True), top_k=4)

    async def main():
        with graphs(monkeypatch, DECIDE) as log:
            async with Engine.open(path, **OPTIONS | {"device": devices}) as engine:
                # One token fills both devices' caches, two more record its layers.
                await feed(engine, IDS)
                assert all(p.tier.holds_all(i) for i, p in enumerate(engine.loaded.places))
                waits, seen = len(cuda.waits), []
                await feed(engine, IDS, lambda: seen.append(len(log.names)))
                assert len(cuda.waits) == waits
                return [log.names[a:b] for a, b in pairwise(seen)]

    tables = ["aten::copy_", "embed_kernel"]
    for names in run(main()):
        end = len(names) - names[::-1].index("graph")
        if devices == "cuda:0":
            # Before the layers the step's tables and the embedding, after them the sum of the last
            # one and the head.
            assert set(names[: names.index("graph")]) == set(tables)
            assert names.count("graph") == 1
        else:
            layers = [n for n in names[:end] if n not in tables]
            assert layers == ["graph", "combine_kernel", "graph", "combine_kernel", "graph"]
        assert names[end:] == ["combine_kernel", "rms_norm_kernel", "matvec_kernel", "aten::copy_"]


def test_the_shared_expert_runs_beside_the_others(model, cuda, monkeypatch):
    """And what comes after both waits for it, also where it is a recording's last."""
    path = model(top_k=4)
    monkeypatch.setattr("fomoe.kernels.gpu.fixed.forks", lambda device: True)
    fork, join = Beside.fork, Beside.join

    async def main():
        with graphs(monkeypatch, DECIDE) as log:

            @contextlib.contextmanager
            def forked(self):
                with fork(self):
                    log.names.append("(")
                    yield
                    log.names.append(")")

            def joined(self):
                log.names.extend(["join"] * self._forked)
                join(self)

            monkeypatch.setattr(Beside, "fork", forked)
            monkeypatch.setattr(Beside, "join", joined)
            async with Engine.open(path, **OPTIONS) as engine:
                await feed(engine, IDS[:1])
                return log.names

    names = run(main())
    shared = ["matvec_kernel", "matvec_kernel", "activate_kernel", "matvec_kernel"]
    layer = ["(", *shared, ")", "gate_up_kernel", "down_kernel", "join"]
    found = [i for i, name in enumerate(names) if name == "("]
    assert len(found) == TOY.layers
    assert all(names[i : i + len(layer)] == layer for i in found)
    assert names.count("join") == TOY.layers


def test_the_next_layers_router_is_asked_beside_the_experts(model, cuda, monkeypatch):
    path = model(layers=3, recurrent_layers=(True, False, True), experts=16, top_k=4)
    monkeypatch.setattr("fomoe.kernels.gpu.ops.matvec", products)
    monkeypatch.setattr("fomoe.loading._LEAST_USE", 0.0)

    async def main():
        with graphs(monkeypatch, DECIDE):
            async with Engine.open(path, **OPTIONS) as engine:
                monkeypatch.setattr(Place, "peeked", lambda self, event: read.append(event))
                await feed(engine, IDS)
                return engine.loaded.places[0].device

    read = []
    device = run(main())
    compute, aside = device.compute.stream, device.aside.stream
    taken = [mark.event for key, mark in device._marks.items() if isinstance(key, tuple)]
    assert len(taken) == 2  # the last layer has none after it
    # It reads a copy that was made before the experts, and the next copy waits for it.
    assert set(aside.waited) == set(taken)
    assert len(aside.waited) > len(IDS)
    assert all(event.stream is compute for event in taken)
    assert all(event.event.stream is aside for event in read)


def test_a_prompts_layers_share_memory(model, cuda, monkeypatch):
    """Else a step of 512 tokens of a large model would hold seven gigabytes that nobody planned."""
    path = model(layers=4, recurrent_layers=(True, False) * 2)
    made, most = weakref.WeakSet(), []
    init = GpuMoeCall.__init__

    def counted(self, *args):
        init(self, *args)
        made.add(self)
        most.append(len(made))

    monkeypatch.setattr(GpuMoeCall, "__init__", counted)

    async def main():
        async with Engine.open(path, **OPTIONS) as engine:
            await engine.logits(list(range(1, 13)))

    run(main())
    assert len(most) == 4
    assert max(most) <= 2


def test_audits_share_memory(model, cuda, monkeypatch):
    path = model(layers=3, recurrent_layers=(True, False, True), experts=16, top_k=4)
    car = CarOptions.parse("prior:0.5")
    monkeypatch.setattr("fomoe.kernels.gpu.ops.matvec", products)

    async def main():
        with graphs(monkeypatch, DECIDE):
            async with Engine.open(path, car=car, car_audit=1.0, **OPTIONS) as engine:
                kept = engine.loaded.places[0].device._kept
                sizes = []
                for num in (3, 6):
                    options = {"max_tokens": num, "ignore_eos": True}
                    assert len([t async for t in engine.generate("there", **options)]) == num
                    sizes.append(len(kept))
                assert engine.stats().residency.car.audits > 4
                assert sizes[0] == sizes[1]

    run(main())


@pytest.mark.parametrize("rule", ["budget:0.3", "prior:0.5"])
def test_stand_ins_of_graphs_are_those_of_the_policy(model, cuda, monkeypatch, rule):
    layers, top_k = 3, 4
    path = model(layers=layers, recurrent_layers=(True, False, True), experts=16, top_k=top_k)
    checked, full, known = [], [], {}
    offer, adopt, select = Residency.offer, CacheAwareRouter.adopt, CacheAwareRouter.select
    car = CarOptions.parse(rule)
    policies = [CacheAwareRouter(car, 1, top_k) for _ in range(layers)]

    def offered(self, layer):
        known[layer] = offer(self, layer)
        return known[layer]

    def adopted(self, layer, logits, ids, weights, used_ids, used_weights):
        available, policies[layer].limit = known[layer]
        want = policies[layer].select(0, logits, ids, weights, available)
        np.testing.assert_array_equal(used_ids, want.ids)
        np.testing.assert_allclose(used_weights, want.weights, rtol=1e-5)
        checked.append(len(want.displaced))
        return adopt(self, layer, logits, ids, weights, used_ids, used_weights)

    def selected(self, layer, logits, ids, weights, available):
        if self not in policies:
            assert available.all(), "the device did not choose, though experts may be missing"
            full.append(layer)
        return select(self, layer, logits, ids, weights, available)

    monkeypatch.setattr("fomoe.kernels.gpu.ops.matvec", products)
    monkeypatch.setattr(Residency, "offer", offered)
    monkeypatch.setattr(CacheAwareRouter, "adopt", adopted)
    monkeypatch.setattr(CacheAwareRouter, "select", selected)
    # Else all experts would soon be on the device: the least budget has room for toys.
    monkeypatch.setattr("fomoe.loading._LEAST_USE", 0.0)

    async def main():
        with graphs(monkeypatch, DECIDE) as log:
            vram = await least(path, "vram", **OPTIONS)
            dram = await least(path, "dram", vram=vram, **OPTIONS)
            async with Engine.open(path, dram=dram, vram=vram, car=car, **OPTIONS) as engine:
                options = {"max_tokens": 12, "ignore_eos": True}
                text = [t.id async for t in engine.generate("there", **options)]
                return text, engine.stats().residency.car, log.names.count("graph")

    _, stats, played = run(main())
    assert stats.substitutions == sum(checked) > 0
    assert len(checked) + len(full) == stats.token_layers
    assert len(checked) > len(full)
    assert played
