"""What one decoder needs to know to be any of the families."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


class Rotary(NamedTuple):
    """How the positions of a layer turn its heads: the base, and the items of the scaling dictionary."""

    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's shape and its variations. Hashable: it is static under `jax.jit`.

    Attributes:
        family: the Hugging Face `model_type`, which names the tensors on disk.
        vocabulary, hidden, intermediate, layers, heads, key_heads, head_dim: sizes.
        max_length: the longest sequence that the positions allow.
        norm: "rms" or "layer"; norm_epsilon; norm_offset: 1.0 where the scale is stored as w - 1 (gemma); norm_bias:
            whether layer norms have one.
        norm_place: where a layer's norms stand: "before" attention and feed-forward, "after" them, "both"
            (gemma2), or "parallel": one norm, whose output both read, and whose results are added (cohere2).
        query_key_norm: norms of the queries and keys: "" for none; "head": each head, by one scale; "heads": each
            head, by a scale of its own; "width": all heads together, before they are split. value_norm: an RMS norm
            of each value head, without a scale.
        keys_are_values: the values are the keys' projection, before its norm and rotation (gemma4).
        keys_from: the number of the segment the keys and values of whose last layer these layers read, for they have
            none of their own; -1 where they have.
        activation: a name in `jaxft.kernels.activations.ACTIVATIONS`; gated: `act(gate) * up`, or `act(up)`.
        attention_bias, output_bias, mlp_bias: biases of q, k, v; of o; of the feed-forward.
        fused_qkv, fused_gate_up: one kernel for q, k and v (gpt2); one for gate and up (phi3).
        positions: "rotary" or "learned"; rope_theta; rope_scaling: items of the scaling dictionary.
        rotaries: each layer's own `Rotary`, None where its heads are not turned; () where all layers are turned alike.
        rotary_dim: how many features of a head are turned, the first ones; 0 for all.
        rotary_pairs: which features turn together: "halves", i and i + rotary_dim / 2, or "neighbours", 2 i and
            2 i + 1.
        query_scale: the factor on attention's logits.
        query_growth: (beta, length): queries at position p are also multiplied by 1 + beta log(1 + floor(p / length));
            () for none.
        attention_softcap, logit_softcap: cap * tanh(x / cap) on them; None for none.
        windows: how far each layer sees (0: everything); () where all layers see everything.
        layer_inputs: features of what each token gives each layer by a table of its own, 0 for none (gemma4);
            layer_vocabulary: rows of that table.
        layer_scalars: a layer's result is multiplied by a number that the model holds.
        embedding_scale, residual_scale, logit_scale: factors on the embedded tokens, on what a layer adds to the
            residual, and on the logits before their cap.
        tied: the head is the embedding transposed.
        parts: (number of layers, ((field, value), ...)) of consecutive layers that differ in structure, by the fields
            in which they do; () where all layers are alike. See `jaxft.models.segments`.
        dtype: that of the computation.
        remat: what the backward pass recomputes: "none", "dots" (all but the projections' outputs), "outputs" (all but
            those of attention and feed-forward), "full" (all but what weights mark by `keep_small`).
    """

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    max_length: int
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_bias: bool = True
    norm_place: str = "before"
    query_key_norm: str = ""
    value_norm: bool = False
    keys_are_values: bool = False
    keys_from: int = -1
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rotaries: tuple[Rotary | None, ...] = ()
    rotary_dim: int = 0
    rotary_pairs: str = "halves"
    query_scale: float = 1.0
    query_growth: tuple[float, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    layer_inputs: int = 0
    layer_vocabulary: int = 0
    layer_scalars: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tied: bool = False
    parts: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = ()
    dtype: str = "float32"
    remat: str = "none"
