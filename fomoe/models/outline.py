"""From a file's keys and tensor table to hyper-parameters, checked before anything is loaded.

Owns: which keys mean what, which tensors a layer part needs and of which shape; the architectures
compose these. Does not know: the forward, backends, weights. Keys: llama.cpp's (llama-arch.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Container

from fomoe.errors import FormatError, UnsupportedError
from fomoe.gguf import ArrayRef, GgufFile
from fomoe.kernels.ops import AttentionSpec, DeltaSpec, MoeSpec
from fomoe.models.base import EMBEDDING, OUTPUT, OUTPUT_NORM, HyperParameters, LayerParameters

SOFTMAX_GATING = 1  # expert_gating_func; 0 is llama.cpp's "not set"


class Outline:
    """Reads what an architecture asks for, and notes every tensor that its forward will use."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self._dense: list[str] = []
        self._num_blocks = self.positive("block_count")
        if self._num_blocks > len(gguf.tensors):
            raise FormatError(f"{self._key('block_count')} is {self._num_blocks}: too few tensors")
        self.num_mtp_layers = self._count_mtp_layers()
        self.num_layers = self._num_blocks - self.num_mtp_layers
        if self.num_layers < 1 or self.num_mtp_layers < 0:
            raise FormatError(
                f"{gguf.paths[0]}: {self.num_mtp_layers} of {self._num_blocks} blocks are said to "
                "be for multi-token prediction"
            )
        self.hidden = self.positive("embedding_length")
        self.eps = self._real("attention.layer_norm_rms_epsilon")
        self._require("rope.scaling.type", "none", ("none",), "RoPE scaling")
        self._require("expert_gating_func", 0, (0, SOFTMAX_GATING), "this router")
        self._require("expert_group_count", 0, (0, 1), "routing by groups of experts")

    # ---- specs, from keys ----

    def attention(self, *, gated: bool) -> AttentionSpec:
        """The attention that all attention layers share."""
        heads = self.positive("attention.head_count")
        kv_heads = self.positive("attention.head_count_kv", heads)
        head_dim = self.positive("attention.key_length", max(self.hidden // heads, 1))
        rope_dims = self.positive("rope.dimension_count", head_dim)
        self._require("attention.value_length", head_dim, (head_dim,), "values of another length")
        if heads % kv_heads:
            raise FormatError(f"{self._path}: {heads} heads cannot share {kv_heads} kv heads")
        if rope_dims % 2 or rope_dims > head_dim:
            raise FormatError(f"{self._key('rope.dimension_count')} is {rope_dims} of {head_dim}")
        return AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope_dims=rope_dims,
            rope_base=self._real("rope.freq_base", 10000.0),
            scale=self._real("attention.scale", 0.0) or head_dim**-0.5,
            eps=self.eps,
            gated=gated,
        )

    def delta(self, *, tiled: bool) -> DeltaSpec:
        """The gated delta-net that all recurrent layers share."""
        k_heads = self.positive("ssm.group_count")
        v_heads = self.positive("ssm.time_step_rank")
        head_dim = self.positive("ssm.state_size")
        inner = self.positive("ssm.inner_size")
        if v_heads % k_heads or inner != v_heads * head_dim:
            raise FormatError(
                f"{self._path}: {v_heads} V heads of {head_dim} do not go with {k_heads} K heads "
                f"and an inner size of {inner}"
            )
        return DeltaSpec(
            k_heads=k_heads,
            v_heads=v_heads,
            head_dim=head_dim,
            conv_kernel=self.positive("ssm.conv_kernel"),
            eps=self.eps,
            tiled=tiled,
        )

    def recurrent_layers(self) -> list[bool]:
        """Which trunk layers are recurrent: the per-layer list where there is one, which wins over
        the interval of full attention."""
        key = "attention.recurrent_layers"
        if f"{self._gguf.architecture}.{key}" in self._gguf.metadata:
            values = [bool(v) for v in self._gguf.numbers(f"{self._gguf.architecture}.{key}")]
            if len(values) < self.num_layers:
                raise FormatError(
                    f"{self._key(key)} has {len(values)} of {self._num_blocks} values"
                )
            return values[: self.num_layers]
        interval = self.positive("full_attention_interval", 4)
        return [(i + 1) % interval != 0 for i in range(self.num_layers)]

    def moe(self, layer: int, default_ff: int | None = None) -> MoeSpec:
        """The routed experts of a layer; uses its router."""
        experts = self._gguf.experts(layer)
        if experts is None:
            raise FormatError(f"{self._path}: tensor blk.{layer}.ffn_down_exps.weight is missing")
        num_experts = self.positive("expert_count")
        top_k = self.positive("expert_used_count")
        if top_k > num_experts:
            raise FormatError(f"{self._key('expert_used_count')} is {top_k} of {num_experts}")
        ff = self._layer_value("expert_feed_forward_length", layer, default_ff)
        self._check(experts.down.name, num_experts, self.hidden, ff)
        self.use(f"blk.{layer}.ffn_gate_inp.weight", num_experts, self.hidden)
        gate, up = experts.gate or experts.gate_up, experts.up or experts.gate_up
        assert gate is not None
        assert up is not None
        return MoeSpec(
            num_experts=num_experts,
            top_k=top_k,
            hidden=self.hidden,
            ff=ff,
            gate_type=gate.type,
            up_type=up.type,
            down_type=experts.down.type,
            weights_scale=self._real("expert_weights_scale", 0.0) or 1.0,
        )

    def dense_ff_share(self) -> int | None:
        """A routed expert's width in files of qwen3moe that do not say it."""
        ff = self._gguf.arch_value("feed_forward_length", int, 0)
        return ff // self.positive("expert_used_count") or None

    # ---- tensors of a layer's parts ----

    def use(self, name: str, *shape: int) -> None:
        """Note a dense tensor that must exist and have that row-major shape."""
        self._check(name, *shape)
        self._dense.append(name)

    def use_attention(self, layer: int, spec: AttentionSpec) -> None:
        p, hidden = f"blk.{layer}.attn_", self.hidden
        inner, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        q_rows = 2 * inner if spec.gated else inner
        if f"{p}qkv.weight" in self._gguf.tensors:
            self.use(f"{p}qkv.weight", q_rows + 2 * kv, hidden)
        else:
            self.use(f"{p}q.weight", q_rows, hidden)
            self.use(f"{p}k.weight", kv, hidden)
            self.use(f"{p}v.weight", kv, hidden)
        self.use(f"{p}q_norm.weight", spec.head_dim)
        self.use(f"{p}k_norm.weight", spec.head_dim)
        self.use(f"{p}output.weight", hidden, inner)

    def use_delta(self, layer: int, spec: DeltaSpec) -> None:
        """All of a delta-net but the projections of its gates: they differ by architecture."""
        p, hidden = f"blk.{layer}.", self.hidden
        if f"{p}ssm_in.weight" in self._gguf.tensors:
            raise UnsupportedError(
                f"{self._path}: tensor {p}ssm_in.weight: this early layout of {self.architecture} "
                "is not supported; use a file converted by a later llama.cpp, with attn_qkv and "
                "attn_gate instead"
            )
        self.use(f"{p}attn_qkv.weight", spec.conv_dim, hidden)
        self.use(f"{p}attn_gate.weight", spec.value_dim, hidden)
        self.use(f"{p}ssm_conv1d.weight", spec.conv_dim, spec.conv_kernel)
        self.use(f"{p}ssm_dt.bias", spec.v_heads)
        self.use(f"{p}ssm_a", spec.v_heads)
        self.use(f"{p}ssm_norm.weight", spec.head_dim)
        self.use(f"{p}ssm_out.weight", hidden, spec.value_dim)

    def use_shared_expert(self, layer: int, ff: int) -> int:
        """The shared expert of a layer, as wide as its key says, else as a routed one."""
        p, hidden = f"blk.{layer}.ffn_", self.hidden
        shared_ff = self._layer_value("expert_shared_feed_forward_length", layer, ff)
        self.use(f"{p}gate_inp_shexp.weight", hidden)
        self.use(f"{p}gate_shexp.weight", shared_ff, hidden)
        self.use(f"{p}up_shexp.weight", shared_ff, hidden)
        self.use(f"{p}down_shexp.weight", hidden, shared_ff)
        return shared_ff

    def finish(self, layers: list[LayerParameters]) -> HyperParameters:
        """Embedding and head; then every tensor of the trunk must have found its use."""
        tensors = self._gguf.tensors
        embedding = self._gguf.tensor(EMBEDDING)
        vocab_size = embedding.shape[0]
        self._check(EMBEDDING, vocab_size, self.hidden)
        self.use(OUTPUT_NORM, self.hidden)
        tied = OUTPUT not in tensors
        self.use(EMBEDDING if tied else OUTPUT, vocab_size, self.hidden)
        self._refuse_unused()
        return HyperParameters(
            architecture=self.architecture,
            num_layers=self.num_layers,
            num_mtp_layers=self.num_mtp_layers,
            hidden=self.hidden,
            vocab_size=vocab_size,
            context_length=self.positive("context_length"),
            eps=self.eps,
            layers=tuple(layers),
            dense_tensors=tuple(self._dense),
            embedding=EMBEDDING,
            embedding_type=embedding.type,
            tied_head=tied,
        )

    # ---- keys and shapes ----

    @property
    def architecture(self) -> str:
        return self._gguf.architecture

    def positive(self, name: str, default: int | None = None) -> int:
        """The architecture's own key `name`, an integer above 0; required without a default."""
        if default is None:
            value = self._gguf.arch_value(name, int)
        else:
            value = self._gguf.arch_value(name, int, default)
        if value < 1:
            raise FormatError(f"{self._key(name)} is {value}; it must be at least 1")
        return value

    def _real(self, name: str, default: float | None = None) -> float:
        """The architecture's own key `name`, finite and above 0 or at its default."""
        if default is None:
            value = self._gguf.arch_value(name, float)
        else:
            value = self._gguf.arch_value(name, float, default)
        if value != default and not 0 < value < math.inf:
            raise FormatError(f"{self._key(name)} is {value}; it must be a positive number")
        return value

    def _layer_value(self, name: str, layer: int, default: int | None) -> int:
        """A key that is one integer for all layers, or an array with one for each."""
        key = f"{self.architecture}.{name}"
        if not isinstance(self._gguf.metadata.get(key), ArrayRef):
            return self.positive(name, default)
        values = self._gguf.numbers(key)
        if layer >= len(values) or values[layer] < 1:
            raise FormatError(f"{self._key(name)} has no width for layer {layer}")
        return int(values[layer])

    def _require(
        self, name: str, default: int | str, allowed: Container[int | str], what: str
    ) -> None:
        """Refuse a file in which a key asks for something that the forward does not do."""
        value = self._gguf.arch_value(name, type(default), default)
        if value not in allowed:
            raise UnsupportedError(f"{self._key(name)} is {value!r}: {what} is not supported")

    def _check(self, name: str, *shape: int) -> None:
        found = self._gguf.tensor(name).shape
        if _trimmed(found) != _trimmed(shape):
            raise FormatError(
                f"{self._path}: tensor {name} has shape {list(found)}, not the {list(shape)} that "
                "the metadata asks for"
            )

    def _refuse_unused(self) -> None:
        """A tensor without a use would have changed the output: no answer is better than a wrong
        one."""
        used = {EMBEDDING, *self._dense}
        for layer in range(self.num_layers):
            experts = self._gguf.experts(layer)
            used.update(t.name for t in (experts.tensors if experts else ()))
        mtp = {f"blk.{i}" for i in range(self.num_layers, self._num_blocks)}
        for name in self._gguf.tensors:
            if name not in used and ".".join(name.split(".")[:2]) not in mtp:
                raise UnsupportedError(
                    f"{self._path}: tensor {name} is not known to the forward of "
                    f"{self.architecture}; it would change the result"
                )

    def _count_mtp_layers(self) -> int:
        """As the key says; files without the key may still have the blocks, which can be told."""
        count = 0
        while f"blk.{self._num_blocks - 1 - count}.nextn.eh_proj.weight" in self._gguf.tensors:
            count += 1
        return self._gguf.arch_value("nextn_predict_layers", int, count)

    @property
    def _path(self) -> str:
        return str(self._gguf.paths[0])

    def _key(self, name: str) -> str:
        return f"{self._path}: key {self.architecture}.{name}"


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones (ggml's trailing ones), which a file may or may not write."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
