"""The kernels of a layer but for its products, with the shapes of a large model, to be compiled.

Owns: the list. Does not know: how they are compiled, what is read from the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fomoe.kernels.gpu import attention, car, delta, norm, route, shared
from fomoe.kernels.gpu.kernel import Kernel
from fomoe.kernels.gpu.steps import TILE

# Qwen3.5-397B: attention, delta-net, experts
HEADS, KV_HEADS, HEAD_DIM, ROPE = 32, 2, 256, 64
DELTA: dict[str, Any] = dict(K_HEADS=16, V_HEADS=64, D=128, TILED=True)
CONV_DIM, EXPERTS, TOP_K, HIDDEN = 12288, 512, 10, 4096
SPLITS = 32


def layer_kernels(arch: str) -> list[Kernel]:
    return [*_norms(), *_attention(arch), *_delta(), *_routing()]


def _kernel(
    name: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int,
    stages: int = 2,
) -> Kernel:  # fmt: skip
    """`types`: of the names, separated by spaces, that have it."""
    arguments = {n: type_ for type_, names in types.items() for n in names.split()}
    return Kernel(
        name=name, function=function, arguments=arguments, constants=constants, warps=warps,
        wide=False, stages=stages,
    )  # fmt: skip


def _norms() -> list[Kernel]:
    return [
        _kernel(
            "rms_norm", norm.rms_norm_kernel,
            {"*fp32": "x weight out", "i32": "ld_x ld_out cols", "fp32": "eps"},
            dict(BLOCK=HIDDEN), 8,
        ),
        _kernel(
            "gated_norm", norm.gated_norm_kernel,
            {"*fp32": "o z weight", "i32": "ld_o ld_z", "fp32": "eps"}, dict(D=128, BLOCK=128), 1,
        ),
        _kernel(
            "activate", shared.activate_kernel, {"*fp32": "gate up", "i32": "count"},
            dict(BLOCK=1024), 4,
        ),
    ]  # fmt: skip


def _attention(arch: str) -> list[Kernel]:
    """With keys and values of float16; and those that multiply them, of float32."""
    wide = []
    for k in _attention_of(arch, 4):
        if k.name in ("rows", "tiles"):
            types = {n: "*fp32" if t == "*fp16" else t for n, t in k.arguments.items()}
            wide.append(replace(k, name=f"{k.name} F32", arguments=types))
    return [*_attention_of(arch, 2), *wide]


def _attention_of(arch: str, cache_bytes: int) -> list[Kernel]:
    blocks = attention.blocks_of(arch, cache_bytes)
    caches, steps = "k_cache v_cache", "positions page_starts pages"
    head = dict(KV_HEADS=KV_HEADS, D=HEAD_DIM, Q_WIDTH=2 * HEAD_DIM, BLOCK_D=HEAD_DIM)
    rest = dict(GROUP=HEADS // KV_HEADS, BLOCK_N=blocks.keys)
    return [
        _kernel(
            "prepare", attention.prepare_kernel,
            {
                "*fp32": "q k v q_norm k_norm cos sin", "*i32": steps, "*fp16": caches,
                "i32": "ld_q ld_k ld_v page_tokens", "fp32": "eps",
            },
            head | dict(
                HEADS=HEADS, ROPE=ROPE, HALF=ROPE // 2, REST=256, BLOCK_H=attention.BLOCK_H,
                Q_NORMED=True, K_NORMED=True,
            ), 4,
        ),
        _kernel(
            "rows", attention.rows_kernel,
            {
                "*fp32": "q sums_out range_out", "*fp16": caches, "*i32": "rows " + steps,
                "i32": "ld_q page_tokens", "fp32": "scale",
            },
            head | rest | dict(ROWS=16, SPLITS=SPLITS), blocks.row_warps, blocks.stages,
        ),
        _kernel(
            "join rows", attention.combine_kernel,
            {"*fp32": "sums ranges q out", "*i32": "rows", "i32": "ld_q ld_out"},
            dict(
                HEADS=HEADS, D=HEAD_DIM, Q_WIDTH=2 * HEAD_DIM, BLOCK_D=HEAD_DIM, SPLITS=SPLITS,
                BLOCK_S=SPLITS, GATED=True,
            ), 4,
        ),
        _kernel(
            "tiles", attention.tiles_kernel,
            {
                "*fp32": "q out", "*fp16": caches, "*i32": "tiles " + steps,
                "i32": "ld_q ld_out page_tokens", "fp32": "scale",
            },
            head | rest | dict(ROWS=blocks.tile_rows, GATED=True), blocks.tile_warps,
            blocks.stages,
        ),
    ]  # fmt: skip


def _delta() -> list[Kernel]:
    gates = "beta alpha dt_bias a "
    chunked = DELTA | dict(
        PIECES=128 // delta.PIECE, PIECE=delta.PIECE, CHUNK=delta.CHUNK,
        PER_TILE=TILE // delta.CHUNK, PRECISION="bf16x3",
    )  # fmt: skip
    made = [
        _kernel(
            f"convolve {name}", delta.convolve_kernel,
            {
                "*fp32": "qkv weight out", "*i64": "states", "*i32": "parts",
                "i32": "ld_in ld_out",
            },
            dict(CHANNELS=CONV_DIM, TAPS=4, SPAN=span, BLOCK_T=min(16, span), BLOCK_C=128), 4,
        )
        for name, span in (("a token", 1), ("a tile", TILE))
    ]  # fmt: skip
    return [
        *made,
        _kernel(
            "delta steps", delta.steps_kernel,
            {
                "*fp32": gates + "mixed out", "*i64": "states", "*i32": "segments",
                "i32": "ld_mixed ld_beta ld_alpha ld_out", "fp32": "eps",
            },
            DELTA | dict(BLOCK_D=128, BLOCK_V=delta.BLOCK_V), 4,
        ),
        _kernel(
            "delta solve", delta.solve_kernel,
            {
                "*fp32": gates + "mixed solved", "*i32": "tiles",
                "i32": "ld_mixed ld_beta ld_alpha", "fp32": "eps",
            },
            chunked, delta.CHUNK_WARPS, 1,
        ),
        _kernel(
            "delta chunks", delta.chunks_kernel,
            {
                "*fp32": "mixed solved out", "*i64": "states", "*i32": "segments",
                "i32": "ld_mixed ld_out",
            },
            chunked | dict(BLOCK_V=delta.BLOCK_V), delta.CHUNK_WARPS, 1,
        ),
    ]  # fmt: skip


def _routing() -> list[Kernel]:
    shape: dict[str, Any] = dict(EXPERTS=EXPERTS, TOP_K=TOP_K, BLOCK_E=EXPERTS, BLOCK_K=16)
    return [
        _kernel(
            "pick", route.pick_kernel,
            {"*fp32": "logits weights", "*i32": "ids", "fp32": "min_sum weights_scale"},
            shape | dict(RENORMALISE=True), 1,
        ),
        *(
            _kernel(
                f"stand-ins {rule}", car.select_kernel,
                {
                    "*fp32": "logits weights new_weights", "*i32": "ids new_ids",
                    "*u8": "available", "*fp64": "limit_at spread terms", "i32": "tokens",
                },
                shape | dict(RULE=rule, TOP_J=2, MAX_RANK=20, RENORM=True), 1,
            )
            for rule in ("light", "ratio", "prior", "max-rank")
        ),
    ]  # fmt: skip
