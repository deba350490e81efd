"""What most families share: llama's names of sizes, rotary settings and tensors, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.models.config import Config, Rotary
from jaxft.models.families.family import Tensor
from jaxft.models.segments import attention_projections, query_key_norms

# As config.json spells them; of several spellings the last is written.
ACTIVATIONS = {
    "swish": "silu",
    "silu": "silu",
    "gelu_python": "gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}
SPELLINGS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
SLIDING, FULL = "sliding_attention", "full_attention"
LAYER = "model.layers.{layer}"
TWO_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
FEED_FORWARD = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def activation_of(name: Any) -> str:
    """config.json's activation by our name. Raises UserError for an unknown one."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json: unknown activation {shown(name)}; jaxft knows {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def causal(raw: Mapping[str, Any]) -> None:
    """UserError where tokens see those behind them: such models embed texts, and write none."""
    if raw.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention: tokens see what follows them, and jaxft trains decoders"
        )


def read_shape(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def write_shape(config: Config) -> dict[str, Any]:
    """The inverse of `read_shape`, and the longest sequence."""
    return {
        "head_dim": config.head_dim,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.key_heads,
        "rms_norm_eps": config.norm_epsilon,
    }


def write_rope(config: Config) -> dict[str, Any]:
    """The rotary settings of a config whose layers all turn alike."""
    if not config.rope_scaling:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    return {"rope_parameters": spelled(config.rope_theta, config.rope_scaling)}


def spelled(theta: float, scaling: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Rotary settings as transformers 5 has them; older files call rope_type type."""
    names = {"type": "rope_type"}
    items = {names.get(key, key): value for key, value in scaling} or {"rope_type": "default"}
    lists = {key: list(x) if isinstance(x, tuple) else x for key, x in items.items()}
    return lists | {"rope_theta": theta}


def rotaries_of(config: Config) -> tuple[Rotary | None, ...]:
    """Each layer's rotary."""
    return config.rotaries or (Rotary(config.rope_theta, config.rope_scaling),) * config.layers


def write_rope_by_kind(config: Config) -> dict[str, Any]:
    """The rotary settings of a config whose kinds of layers, by their windows, turn differently."""
    found = dict(zip(kinds_of(config), rotaries_of(config), strict=True))
    return {"rope_parameters": {kind: spelled(*one) for kind, one in found.items() if one}}


def windows_of(kinds: Sequence[Any], window: int | None) -> tuple[int, ...]:
    """How far each layer sees, of config.json's `layer_types` and `sliding_window`."""
    if not window or SLIDING not in kinds:
        return ()
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def kinds_of(config: Config) -> list[str]:
    """The inverse of `windows_of`: `layer_types`."""
    windows = config.windows or (0,) * config.layers
    return [SLIDING if window else FULL for window in windows]


def window_of(config: Config) -> int | None:
    """The inverse of `windows_of`: `sliding_window`."""
    return max(config.windows) if any(config.windows) else None


def tensors_by_name(
    config: Config,
    norms: Mapping[str, str],
    *,
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The table of a family that names modules as llama does, but for some.

    Args:
        config: the shape, whose variations say which leaves there are.
        norms: {our norm of a layer: its module in the layer}.
        modules: {our projection or norm of queries and keys: its module in the layer}, where llama's name is another.
        top: {our top-level module: its name}, likewise.
    """
    modules, top = modules or {}, top or {}
    tensors = {"embed/embedding": Tensor(f"{top.get('embed', 'model.embed_tokens')}.weight")}
    for name, biased in _projections(config).items():
        part = "mlp" if name in FEED_FORWARD else "attention"
        own = modules.get(name, f"{'mlp' if part == 'mlp' else 'self_attn'}.{name}")
        module = f"{LAYER}.{own}"
        tensors[f"layers/{part}/{name}/kernel"] = Tensor(f"{module}.weight", transposed=True)
        if biased:
            tensors[f"layers/{part}/{name}/bias"] = Tensor(f"{module}.bias")
    for name in query_key_norms(config):
        module = f"{LAYER}.{modules.get(name, f'self_attn.{name}')}"
        tensors[f"layers/attention/{name}/scale"] = Tensor(f"{module}.weight")
    biased = config.norm == "layer" and config.norm_bias
    named = {f"layers/{path}": f"{LAYER}.{name}" for path, name in norms.items()}
    for path, module in {**named, "final_norm": top.get("final_norm", "model.norm")}.items():
        tensors[f"{path}/scale"] = Tensor(f"{module}.weight")
        if biased:
            tensors[f"{path}/bias"] = Tensor(f"{module}.bias")
    if not config.tied:
        tensors["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    return tensors


def _projections(config: Config) -> dict[str, bool]:
    """{projection: whether it has a bias}."""
    found = dict.fromkeys(attention_projections(config), config.attention_bias)
    found["o_proj"] = config.output_bias
    wide = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    wide = ("gate_up_proj",) if config.fused_gate_up else wide
    return found | dict.fromkeys((*wide, "down_proj"), config.mlp_bias)
