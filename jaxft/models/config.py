"""What one decoder needs to know to be any of the families."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's shape and its variations. Hashable: it is static under `jax.jit`.

    Attributes:
        family: the Hugging Face `model_type`, which names the tensors on disk.
        vocabulary, hidden, intermediate, layers, heads, key_heads, head_dim: sizes.
        max_length: the longest sequence that the positions allow.
        norm: "rms" or "layer"; norm_epsilon; norm_offset: 1.0 where the scale is stored as w - 1 (gemma).
        post_norms: norms after attention and feed-forward too (gemma2).
        activation: "silu", "gelu" or "gelu_tanh"; gated: `act(gate) * up`, or `act(up)`.
        attention_bias, output_bias, mlp_bias: biases of q, k, v; of o; of the feed-forward.
        fused_qkv: one kernel for q, k and v (gpt2).
        positions: "rotary" or "learned"; rope_theta; rope_scaling: items of the scaling dictionary.
        query_scale: the factor on attention's logits.
        attention_softcap, logit_softcap: cap * tanh(x / cap) on them; None for none.
        windows: how far each layer sees (0: everything); () where all layers see everything.
        embedding_scale: the factor on the embedded tokens.
        tied: the head is the embedding transposed.
        dtype: that of the computation.
        remat: what the backward pass recomputes: "none", "dots" (all but the projections' outputs), "full" (all but
            what weights mark by `keep_small`).
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
    post_norms: bool = False
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    tied: bool = False
    dtype: str = "float32"
    remat: str = "none"
