"""The qwen35moe of tools/train_demo: a differentiable forward over tensors named as in GGUF.

Owns: the forward of a whole batch (chunked delta rule, gated attention, routed and shared experts)
and measures of its routing. Does not know: files, text, optimisers.

Weights lie as GGUF lays them out (V heads tiled over K heads, query and gate interleaved by head,
norms as plain factors), so that a file is read and written without a conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

CHUNK = 64
ROWS = 64
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Hyper-parameters, as the keys of the file name them."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_dims: int
    rope_base: float
    eps: float
    experts: int
    top_k: int
    k_heads: int
    v_heads: int
    state_dim: int
    conv_kernel: int
    interval: int

    def is_attention(self, layer: int) -> bool:
        return (layer + 1) % self.interval == 0


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing of n tokens: ids [n, k], probabilities [n, experts], logits likewise."""

    ids: Tensor
    probabilities: Tensor
    logits: Tensor


def forward(weights: Weights, shape: Shape, ids: Tensor) -> tuple[Tensor, list[Routing]]:
    """Logits [batch, time, vocab] of ids [batch, time], and every layer's routing.

    Matrices are multiplied in the type of their weights; norms, routers, the delta rule and the
    residual stream stay in float32.
    """
    x = F.embedding(ids, weights["token_embd.weight"]).float()
    routings = []
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        h = rms(x, part["attn_norm.weight"], shape.eps)
        mix = attention if shape.is_attention(layer) else delta_net
        x = x + mix(part, shape, h)
        h = rms(x, part["post_attention_norm.weight"], shape.eps)
        y, routing = moe(part, shape, h.flatten(0, 1))
        x = x + y.view_as(x)
        routings.append(routing)
    h = rms(x, weights["output_norm.weight"], shape.eps)
    return multiply(h, weights["output.weight"]).float(), routings


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in]."""
    return F.linear(x.to(weight.dtype), weight)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def moe(part: Weights, shape: Shape, x: Tensor) -> tuple[Tensor, Routing]:
    """Routed and shared experts of x [n, hidden]."""
    logits = F.linear(x, part["ffn_gate_inp.weight"])
    probabilities = logits.softmax(-1)
    top, ids = probabilities.topk(shape.top_k, dim=-1)
    top = top / top.sum(-1, keepdim=True)

    narrow = x.to(part["ffn_gate_exps.weight"].dtype)
    picks, counts = group(ids, shape.experts)
    gates, ups, downs = (part[f"ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
    tokens = picks.clamp(max=ids.numel() - 1) // shape.top_k
    outputs = [
        swiglu(rows, *matrices)
        for rows, *matrices in zip(
            narrow[tokens].split(counts), gates.unbind(), ups.unbind(), downs.unbind(), strict=True
        )
        if len(rows)
    ]
    factors = torch.cat([top.flatten(), top.new_zeros(1)])[picks]
    routed = torch.zeros_like(x).index_add(0, tokens, torch.cat(outputs).float() * factors[:, None])

    names = ("gate", "up", "down")
    shared = swiglu(narrow, *(part[f"ffn_{name}_shexp.weight"] for name in names))
    gate = torch.sigmoid(x @ part["ffn_gate_inp_shexp.weight"])
    y = routed + gate[:, None] * shared.float()
    return y, Routing(ids, probabilities, logits)


def group(ids: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Positions in ids [n, k] grouped by expert, and the length of each expert's group.

    Groups are filled up with ids.numel(), which is no pick: oneDNN makes a kernel for every number
    of rows that it meets, which takes longer than to run it.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    picks = torch.full((int(padded.sum()),), len(flat), device=ids.device)
    picks[torch.arange(len(flat), device=ids.device) + shift[flat[order]]] = order
    return picks, padded.tolist()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def attention(part: Weights, shape: Shape, x: Tensor) -> Tensor:
    """Causal attention of x [batch, time, hidden] with a gate on its output."""
    batch, time, _ = x.shape
    dim = shape.head_dim
    q, gate = multiply(x, part["attn_q.weight"]).view(batch, time, -1, 2, dim).float().unbind(3)
    k, v = (multiply(x, part[f"attn_{n}.weight"]).view(batch, time, -1, dim).float() for n in "kv")
    q = rope(rms(q, part["attn_q_norm.weight"], shape.eps), shape)
    k = rope(rms(k, part["attn_k_norm.weight"], shape.eps), shape)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    k, v = (a.repeat_interleave(shape.heads // shape.kv_heads, 1) for a in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    gated = (out * torch.sigmoid(gate)).flatten(2)
    return multiply(gated, part["attn_output.weight"]).float()


def rope(x: Tensor, shape: Shape) -> Tensor:
    """Rotates the first dimensions of x [batch, time, heads, dim], pairs a half apart (NEOX)."""
    half = shape.rope_dims // 2
    step = torch.arange(half, dtype=torch.float64, device=x.device) / half
    position = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angle = (position[:, None] * shape.rope_base**-step)[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def delta_net(part: Weights, shape: Shape, x: Tensor) -> Tensor:
    """Gated delta-net of x [batch, time, hidden] from an empty state."""
    batch, time, _ = x.shape
    dim, tiles = shape.state_dim, shape.v_heads // shape.k_heads
    mixed = multiply(x, part["attn_qkv.weight"]).float().transpose(1, 2)
    taps = part["ssm_conv1d.weight"]
    mixed = F.conv1d(F.pad(mixed, (shape.conv_kernel - 1, 0)), taps[:, None], groups=len(taps))
    mixed = F.silu(mixed).transpose(1, 2).reshape(batch, time, -1, dim)
    q, k, v = mixed.split([shape.k_heads, shape.k_heads, shape.v_heads], 2)
    q, k = ((a * (a.square().sum(-1, keepdim=True) + shape.eps).rsqrt()) for a in (q, k))
    q, k = (a.repeat(1, 1, tiles, 1).transpose(1, 2) for a in (q * dim**-0.5, k))

    beta = torch.sigmoid(multiply(x, part["ssm_beta.weight"]).float()).transpose(1, 2)
    rate = F.softplus(multiply(x, part["ssm_alpha.weight"]).float() + part["ssm_dt.bias"])
    decay = (part["ssm_a"] * rate).transpose(1, 2)
    out = delta_rule(q, k, v.transpose(1, 2), decay, beta).transpose(1, 2)

    z = multiply(x, part["attn_gate.weight"]).float().view_as(out)
    out = rms(out, part["ssm_norm.weight"], shape.eps) * F.silu(z)
    return multiply(out.flatten(2), part["ssm_out.weight"]).float()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule by chunks: q, k, v [batch, heads, time, dim], decay (log) and beta
    [batch, heads, time]. Yang et al. 2024, arXiv:2412.06464, section 3.3.
    """
    time = q.shape[2]
    pad = -time % CHUNK
    q, k, v = (F.pad(a, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for a in (q, k, v))
    decay, beta = (F.pad(a, (0, pad)).unflatten(2, (-1, CHUNK)) for a in (decay, beta))
    total = decay.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # Masked before exp: above the diagonal it would overflow.
    ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * ratio).tril(-1)
    grown = total.exp()[..., None]
    right = beta[..., None] * torch.cat([v, grown * k], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.chunk(2, -1)
    within = (q @ k.mT) * ratio
    from_state = grown * q
    to_state = (total[..., -1:] - total).exp()[..., None] * k
    last = grown[..., -1:, :]

    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    chunks = (values, keys, from_state, within, last, to_state.mT)
    # unbind, not an index: the gradient of an index is as large as the whole tensor.
    for value, key, read, inside, shrink, write in zip(*(a.unbind(2) for a in chunks), strict=True):
        new = value - key @ state
        outputs.append(read @ state + inside @ new)
        state = shrink * state + write @ new
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :time]


def imbalance(routing: Routing, shape: Shape) -> Tensor:
    """Fedus et al. 2021, arXiv:2101.03961, equation 4: 1 for even use, `experts` for one alone.

    Taken over a micro-batch of unrelated passages, so that a passage may prefer its own experts.
    """
    counts = torch.bincount(routing.ids.flatten(), minlength=shape.experts)
    share = counts / routing.ids.numel()
    return shape.experts * (share * routing.probabilities.mean(0)).sum()


def describe(picked: Tensor, shape: Shape) -> str:
    """Of picks [sequences, time, layers, k]: overlap of neighbours, skew of use."""
    used = F.one_hot(picked, shape.experts).sum(3).float()
    overlap = (used[:, 1:] * used[:, :-1]).sum((0, 1, 3)) / used[:, 1:].sum((0, 1, 3))
    use = used.mean((0, 1)).sort(descending=True).values / shape.top_k
    top = use[:, : shape.experts // 4].sum(1)
    effective = (-(use * use.clamp_min(1e-9).log()).sum(1)).exp()
    layers = " ".join(f"{100 * x:.0f}" for x in overlap)
    return (
        f"of a token's experts the previous had {100 * overlap.mean():.1f} % (by layer {layers}); "
        f"the most used quarter takes {100 * top.mean():.0f} %, "
        f"{effective.mean():.1f} experts in effect"
    )
