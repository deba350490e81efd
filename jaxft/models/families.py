"""The families: how each one's config.json reads as a `Config`, and where its tensors stand in the tree.

A family is a function from config.json to `Config` and a table of (path in the tree, tensor on disk). To add
one, write both and put it into `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.errors import UserError, nearest, shown
from jaxft.models.config import Config
from jaxft.models.rope import rope_settings

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a leaf stands on disk.

    Attributes:
        name: the tensor's name, with {layer} for a leaf that is stacked in the tree.
        transposed: it is stored (out, in), as PyTorch's linear layers are.
    """

    name: str
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module that holds it: the name without `.weight` or `.bias`."""
        return self.name.rsplit(".", 1)[0]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture on disk.

    Attributes:
        architecture: its class name in config.json.
        read: config.json -> Config.
        tensors: Config -> {path in the tree: Tensor}. The prefix is that of the model with its head.
        prefix: what files saved from the model without its head leave out.
        ignored: endings of tensors that hold no weight (buffers that old files carry).
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], Config]
    tensors: Callable[[Config], dict[str, Tensor]]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


def family_of(model_type: Any, where: str) -> Family:
    """The family of a config.json's `model_type`. Raises UserError that lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = nearest(str(model_type), FAMILIES)
        raise UserError(
            f"{where}: unknown architecture {shown(model_type)}{hint}; jaxft knows {known}"
        )
    return FAMILIES[model_type]


def tensors_of(config: Config) -> dict[str, Tensor]:
    """{path in the tree: Tensor} of a decoder's family, its biases and head as the config says."""
    return FAMILIES[config.family].tensors(config)


def module_names(config: Config) -> dict[str, str]:
    """{path of a kernel: its module's name with {layer}}: the names that PEFT knows modules by."""
    names = {path: tensor.module for path, tensor in tensors_of(config).items()}
    return names | {"head/kernel": "lm_head"}


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json: unknown activation {shown(name)}; jaxft knows {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _shape(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, under the names that llama gave them and most families kept."""
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return {
        "family": raw["model_type"],
        "vocabulary": raw["vocab_size"],
        "hidden": raw["hidden_size"],
        "intermediate": raw["intermediate_size"],
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "key_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "query_scale": head_dim**-0.5,
        "norm_epsilon": raw.get("rms_norm_eps", 1e-6),
    }


def _llama(raw: Mapping[str, Any]) -> Config:
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 2048)
    return Config(
        **_shape(raw),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=_activation(raw.get("hidden_act", "silu")),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def _qwen2(raw: Mapping[str, Any]) -> Config:
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window") if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    length = raw.get("max_position_embeddings", 32768)
    return Config(
        **_shape(raw),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=_activation(raw.get("hidden_act", "silu")),
        attention_bias=True,
        windows=_windows(kinds, window),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def _gemma2(raw: Mapping[str, Any]) -> Config:
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or ["sliding_attention", "full_attention"] * ((layers + 1) // 2)
    scale = raw.get("query_pre_attn_scalar", 256) ** -0.5
    shape = _shape({"head_dim": 256, **raw}) | {"query_scale": scale}
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 8192)
    return Config(
        **shape,
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        norm_offset=1.0,
        post_norms=True,
        activation=_activation(
            raw.get("hidden_activation") or raw.get("hidden_act") or "gelu_pytorch_tanh"
        ),
        attention_bias=bias,
        output_bias=bias,
        attention_softcap=raw.get("attn_logit_softcapping", 50.0),
        logit_softcap=raw.get("final_logit_softcapping", 30.0),
        windows=_windows(kinds[:layers], raw.get("sliding_window", 4096)),
        embedding_scale=raw["hidden_size"] ** 0.5,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def _gpt2(raw: Mapping[str, Any]) -> Config:
    for flag in (
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    ):
        if raw.get(flag, False):
            raise UserError(f"config.json: {flag} = true is not known to jaxft's gpt2")
    heads, hidden = raw["n_head"], raw["n_embd"]
    head_dim = hidden // heads
    return Config(
        family="gpt2",
        vocabulary=raw["vocab_size"],
        hidden=hidden,
        intermediate=raw.get("n_inner") or 4 * hidden,
        layers=raw["n_layer"],
        heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        max_length=raw.get("n_positions", 1024),
        norm="layer",
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=_activation(raw.get("activation_function", "gelu_new")),
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv=True,
        positions="learned",
        query_scale=head_dim**-0.5 if raw.get("scale_attn_weights", True) else 1.0,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def _windows(kinds: Any, window: int | None) -> tuple[int, ...]:
    if not window or "sliding_attention" not in kinds:
        return ()
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _llama_tensors(config: Config, norms: Mapping[str, str]) -> dict[str, Tensor]:
    """The names that llama gave and qwen2 and gemma2 kept."""
    layer = "model.layers.{layer}"
    biases = {
        "q_proj": config.attention_bias,
        "k_proj": config.attention_bias,
        "v_proj": config.attention_bias,
        "o_proj": config.output_bias,
        "gate_proj": config.mlp_bias,
        "up_proj": config.mlp_bias,
        "down_proj": config.mlp_bias,
    }
    tensors = {"embed/embedding": Tensor("model.embed_tokens.weight")}
    for name, biased in biases.items():
        part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
        module = f"{layer}.{'mlp' if part == 'mlp' else 'self_attn'}.{name}"
        tensors[f"layers/{part}/{name}/kernel"] = Tensor(f"{module}.weight", transposed=True)
        if biased:
            tensors[f"layers/{part}/{name}/bias"] = Tensor(f"{module}.bias")
    for path, name in norms.items():
        tensors[f"layers/{path}/scale"] = Tensor(f"{layer}.{name}.weight")
    tensors["final_norm/scale"] = Tensor("model.norm.weight")
    if not config.tied:
        tensors["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    return tensors


def _two_norms(config: Config) -> dict[str, Tensor]:
    return _llama_tensors(
        config, {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )


def _four_norms(config: Config) -> dict[str, Tensor]:
    return _llama_tensors(
        config,
        {
            "attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        },
    )


def _gpt2_tensors(config: Config) -> dict[str, Tensor]:
    """GPT-2's names; its Conv1D kernels are stored (in, out)."""
    layer = "transformer.h.{layer}"
    modules = {
        "layers/attention_norm": (f"{layer}.ln_1", "scale"),
        "layers/attention/qkv_proj": (f"{layer}.attn.c_attn", "kernel"),
        "layers/attention/o_proj": (f"{layer}.attn.c_proj", "kernel"),
        "layers/mlp_norm": (f"{layer}.ln_2", "scale"),
        "layers/mlp/up_proj": (f"{layer}.mlp.c_fc", "kernel"),
        "layers/mlp/down_proj": (f"{layer}.mlp.c_proj", "kernel"),
        "final_norm": ("transformer.ln_f", "scale"),
    }
    tensors = {
        "embed/embedding": Tensor("transformer.wte.weight"),
        "positions/embedding": Tensor("transformer.wpe.weight"),
    }
    for path, (module, leaf) in modules.items():
        tensors[f"{path}/{leaf}"] = Tensor(f"{module}.weight")
        tensors[f"{path}/bias"] = Tensor(f"{module}.bias")
    if not config.tied:
        tensors["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    return tensors


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _two_norms),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _two_norms),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _four_norms),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        _gpt2_tensors,
        prefix="transformer.",
        ignored=("attn.bias", "attn.masked_bias"),
    ),
}
