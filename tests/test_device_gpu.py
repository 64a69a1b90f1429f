"""The engine on the GPU's kernels (in Triton's interpreter), through the CUDA device and a runtime
that is made up: everything that runs with a card but the card."""

import asyncio
import dataclasses

import numpy as np
import pytest
from harness import nmse
from toy import K_TOY, Toy, write_toy

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from fake_cuda import fake_library, install  # noqa: E402

import fomoe  # noqa: E402
from fomoe import Engine  # noqa: E402
from fomoe.experts.placement import Costs  # noqa: E402
from fomoe.kernels.device_cuda import CudaDevice  # noqa: E402
from fomoe.kernels.device_runtime import Runtime  # noqa: E402

TOY = Toy(
    hidden=32, layers=2, recurrent_layers=(True, False), experts=4, top_k=2, ff=32, heads=2,
    kv_heads=1, shared_ff=32, head_dim=32, k_heads=1, v_heads=2, state_dim=32, vocab=290,
)  # fmt: skip
OPTIONS = {"context": 64, "ubatch": 16, "threads": 2, "cache_type": "f32"}
IDS = [5, 17, 200, 33]
COPY, HOST = Costs(1e-9, 1.0, 1.0), Costs(1.0, 1e-9, 1e-9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", TOY)


@pytest.fixture
def cuda(monkeypatch):
    """Cards that are not there; `library.costs` says what is faster."""
    install(monkeypatch)
    library = fake_library()
    library.costs = COPY

    def opened(name):
        return CudaDevice(name, 0, place=torch.device("cpu"), runtime=Runtime("cuda", library))

    async def costs(device, helper, layers, *memory):
        return {p.index: library.costs for p, _ in layers}

    monkeypatch.setattr("fomoe.fleet.open_device", opened)
    monkeypatch.setattr("fomoe.fleet.measure_costs", costs)
    monkeypatch.setattr("fomoe.host.resident_bytes", lambda: 300 << 20)
    return library


async def logits_of(model, **options):
    """Logits after a few tokens and after two more, one by one; and the tiers' counters."""
    async with Engine.open(model, **OPTIONS, **options) as engine:
        rows = engine.feed([IDS[:2], *([i] for i in IDS[2:])], max_tokens=len(IDS))
        logits = np.stack([row async for row in rows])
        tiers = dict.fromkeys(place.tier for place in engine.loaded.places)
        return logits, [dataclasses.replace(tier.stats) for tier in tiers]


def run(main):
    return asyncio.run(asyncio.wait_for(main, 300))


@pytest.mark.slow
def test_devices_agree_with_the_processor_and_with_each_other(model, cuda):
    async def main():
        alone, _ = await logits_of(model)
        one, _ = await logits_of(model, device="cuda:0")
        with pytest.raises(fomoe.BudgetError) as refusal:
            await Engine.open(model, device="cuda:0,cuda:0", vram=1 << 16, **OPTIONS)
        least = int(str(refusal.value).split("needs ")[1].split(" MiB")[0]) << 20
        two, stats = await logits_of(model, device="cuda:0,cuda:0", vram=least)
        return alone, one, two, stats

    alone, one, two, stats = run(main())
    error = nmse(one, alone)
    print(f"NMSE against the processor's 8-bit products {error:.2e}")
    assert error < 1e-2
    np.testing.assert_array_equal(one, two)
    assert all(s.copied and s.pick_hits for s in stats)
    assert not cuda.pinned
    assert cuda.copies


@pytest.mark.slow
def test_the_processor_helps(model, cuda):
    async def main():
        alone, _ = await logits_of(model, device="cuda:0")
        cuda.costs = HOST
        helped, stats = await logits_of(model, device="cuda:0,cuda:0")
        pinned, pinned_stats = await logits_of(model, device="cuda:0", cpu_moe=True)
        return alone, helped, stats, pinned, pinned_stats

    alone, helped, stats, pinned, pinned_stats = run(main())
    assert all(s.host_uses and s.pick_hits for s in stats)
    assert all(s.host_uses == s.uses and not s.copied for s in pinned_stats)
    for other in (helped, pinned):
        assert nmse(other, alone) < 1e-2


def test_refused_pinning_is_one_line(model, cuda, monkeypatch, caplog):
    refusing = fake_library(refuse_pinning=True)
    monkeypatch.setattr(
        "fomoe.fleet.open_device",
        lambda name: CudaDevice(
            name, 0, place=torch.device("cpu"), runtime=Runtime("cuda", refusing)
        ),
    )

    async def main():
        async with Engine.open(model, device="cuda:0,cuda:0", **OPTIONS) as engine:
            await engine.logits(IDS[:3])

    run(main())
    assert caplog.text.count("cannot be pinned for cuda:0 (") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate_type": "Q2_K"},
            "layer 0 has experts of type Q2_K, .* with --cpu-moe, use --device",
        ),
        (
            {"dense_type": "Q3_K"},
            r"blk.0.attn_qkv.weight is of type Q3_K, .* use --device cpu, or a file",
        ),
        ({"embed_type": "Q3_K"}, r"token_embd.weight is of type Q3_K, .* use --device cpu"),
    ],
)
def test_types_without_a_kernel_are_refused_before_loading(cuda, tmp_path, changes, message):
    path = write_toy(tmp_path / "toy.gguf", dataclasses.replace(K_TOY, layers=2, **changes))
    told = []
    with pytest.raises(fomoe.UnsupportedError, match=f"^{message}"):
        run(opened(path, device="cuda:0", progress=lambda *done: told.append(done)))
    assert not told


async def opened(path, **options):
    async with Engine.open(path, **OPTIONS, **options) as engine:
        return engine.plan


def test_experts_without_a_kernel_may_be_the_processors(cuda, tmp_path):
    path = write_toy(tmp_path / "toy.gguf", dataclasses.replace(K_TOY, layers=1, gate_type="Q2_K"))
    assert not run(opened(path, device="cuda:0", cpu_moe=True)).devices[0].num_slots
