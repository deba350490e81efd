"""What the files of each architecture say beside the sizes that all of them have, as config.json says it."""

from __future__ import annotations

from typing import Any

from jaxft.errors import UserError, shown
from jaxft.formats.gguf.header import Header
from jaxft.formats.gguf.rotary import longrope_scaling, rotary_scaling, short
from jaxft.models.families.common import FULL, SLIDING

Settings = dict[str, Any]
LAYERS = 2**12  # more than any model has


def llama_like(header: Header, name: str) -> Settings:
    """Head size and rotary scaling."""
    raw: Settings = {}
    for key in ("attention.key_length", "rope.dimension_count"):
        if (size := header.metadata.get(f"{name}.{key}")) is not None:
            raw["head_dim"] = size
            break
    values = header.metadata.get(f"{name}.attention.value_length", raw.get("head_dim"))
    turned = header.metadata.get(f"{name}.rope.dimension_count", raw.get("head_dim"))
    if not values == turned == raw.get("head_dim"):
        raise UserError(
            f"{header.file}: keys of {raw.get('head_dim')} features, values of {shown(values)}, of which "
            f"{shown(turned)} turn: jaxft's {name} has one size for them"
        )
    return raw | rotary_scaling(header, name)


def llama(header: Header, name: str) -> Settings:
    for key in ("expert_count", "attention.sliding_window"):
        if header.metadata.get(f"{name}.{key}"):
            raise UserError(f"{header.file}: {name}.{key} is not known to jaxft's {name}")
    return llama_like(header, name) | {
        "attention_bias": _biased(header, "attn_q"),
        "mlp_bias": _biased(header, "ffn_up"),
    }


def _biased(header: Header, module: str) -> bool:
    return f"blk.0.{module}.bias" in header.tensors


def mistral3(header: Header, name: str) -> Settings:
    """Ministral 3, or Mistral Small 3, whose queries do not grow."""
    if header.metadata.get(f"{name}.expert_count"):
        raise UserError(f"{header.file}: {name}.expert_count is not known to jaxft's {name}")
    raw = llama_like(header, name)
    beta = header.metadata.get(f"{name}.attention.temperature_scale")
    if beta is None:
        return raw | {"model_type": "mistral", "sliding_window": None}
    scaling = raw.pop("rope_scaling", None)
    if not scaling:
        raise UserError(f"{header.file}: {name}.rope.scaling.type is not yarn")
    theta = short(header.metadata.get(f"{name}.rope.freq_base", 10000.0))
    # Both strengths are one number in all its folders, and the file has room for one.
    both = {"mscale": scaling["mscale_all_dim"]} if "mscale_all_dim" in scaling else {}
    own = {"rope_theta": theta, "llama_4_scaling_beta": short(beta)}
    return raw | {"sliding_window": None, "rope_parameters": {**scaling, **both, **own}}


def qwen3(header: Header, name: str) -> Settings:
    return llama_like(header, name) | {"attention_bias": _biased(header, "attn_q")}


def gemma(header: Header, name: str) -> Settings:
    return {"head_dim": header.need(f"{name}.attention.key_length", int)}


def gemma2(header: Header, name: str) -> Settings:
    window = header.metadata.get(f"{name}.attention.sliding_window", 4096)
    size = header.need(f"{name}.attention.key_length", int)
    heads = header.need(f"{name}.attention.head_count", int)
    hidden = header.need(f"{name}.embedding_length", int)
    large = header.metadata.get(f"{name}.block_count") == 46  # of 27B, as llama.cpp tells it
    softcaps = {
        "attn_logit_softcapping": (f"{name}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": (f"{name}.final_logit_softcapping", 30.0),
    }
    return {
        "head_dim": size,
        "query_pre_attn_scalar": hidden // heads if large else size,
        "sliding_window": window,
        **{key: header.metadata.get(*usual) for key, usual in softcaps.items()},
    }


def gemma3(header: Header, name: str) -> Settings:
    size = header.need(f"{name}.attention.key_length", int)
    heads = header.need(f"{name}.attention.head_count", int)
    hidden = header.need(f"{name}.embedding_length", int)
    scaling = rotary_scaling(header, name)
    kinds, _ = _kinds(header, name, 6)
    theta = header.metadata.get(f"{name}.rope.freq_base", 1e6)
    inside = header.metadata.get(f"{name}.rope.freq_base_swa", 1e4)
    softcap = header.metadata.get(f"{name}.final_logit_softcapping")
    return {
        "head_dim": size,
        "layer_types": kinds,
        "final_logit_softcapping": short(softcap),
        "query_pre_attn_scalar": hidden // heads if len(kinds) == 62 else size,  # 62: of 27B
        "rope_parameters": _by_kind(scaling, theta, inside),
        "sliding_window": header.metadata.get(f"{name}.attention.sliding_window", 1024),
    }


def _by_kind(scaling: Settings, theta: Any, inside: Any) -> Settings:
    """`rope_parameters`: the scaling and its base for layers that see everything; only a base inside a window."""
    return {
        FULL: {
            **(scaling.get("rope_scaling") or {"rope_type": "default"}),
            "rope_theta": short(theta),
        },
        SLIDING: {"rope_type": "default", "rope_theta": short(inside)},
    }


def _kinds(header: Header, name: str, every: int) -> tuple[list[str], int | None]:
    """(`layer_types`, the window) of a file: by its own list, or all layers but each of that number have the window.

    All see everything where it has none.
    """
    layers = header.need(f"{name}.block_count", int)
    if not 0 < layers <= LAYERS:
        raise UserError(f"{header.file}: {shown(layers)} is no number for layers")
    window = header.metadata.get(f"{name}.attention.sliding_window") or None
    pattern = header.metadata.get(f"{name}.attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [bool(pattern and (layer + 1) % pattern) for layer in range(layers)]
    if len(pattern) != layers:
        raise UserError(
            f"{header.file}: {name}.attention.sliding_window_pattern has {len(pattern)} entries for {layers} layers"
        )
    return [SLIDING if window and one else FULL for one in pattern], window


def _part(header: Header, name: str) -> Settings:
    """`partial_rotary_factor`: of a head's features, how many turn."""
    heads = header.need(f"{name}.attention.head_count", int)
    hidden = header.need(f"{name}.embedding_length", int)
    size = header.metadata.get(f"{name}.attention.key_length", hidden // max(heads, 1))
    turned = header.metadata.get(f"{name}.rope.dimension_count", size)
    if not isinstance(size, int) or not isinstance(turned, int) or not 0 < turned <= size:
        raise UserError(
            f"{header.file}: {shown(turned)} of a head's {shown(size)} features cannot turn"
        )
    return {"partial_rotary_factor": turned / size}


def phi3(header: Header, name: str) -> Settings:
    original = header.metadata.get(f"{name}.rope.scaling.original_context_length")
    return {
        **_part(header, name),
        **longrope_scaling(header, name),
        **({} if original is None else {"original_max_position_embeddings": original}),
        "sliding_window": header.metadata.get(f"{name}.attention.sliding_window") or None,
    }


def smollm3(header: Header, name: str) -> Settings:
    """Each fourth layer does not turn, as in llama.cpp."""
    return llama(header, name) | {"no_rope_layer_interval": 4, "use_sliding_window": False}


def granite(header: Header, name: str) -> Settings:
    scales = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    found = {key: header.metadata.get(f"{name}.{one}") for key, one in scales.items()}
    size = header.metadata.get(f"{name}.rope.dimension_count")
    usual = {"attention_multiplier": size**-0.5} if isinstance(size, int) and size > 0 else {}
    given = {key: short(value) for key, value in found.items() if value}
    return llama(header, name) | usual | given


def olmo2(header: Header, name: str) -> Settings:
    """OLMo 2, or 3 where there is a window: its scaling stretches the layers that see everything."""
    raw = llama_like(header, name) | {"attention_bias": _biased(header, "attn_q")}
    kinds, window = _kinds(header, name, 4)
    if window is None:
        return raw
    theta = header.metadata.get(f"{name}.rope.freq_base", 10000.0)
    inside = header.metadata.get(f"{name}.rope.freq_base_swa", theta)
    parameters = _by_kind(raw, theta, inside)
    raw.pop("rope_scaling", None)
    return raw | {
        "model_type": "olmo3",
        "layer_types": kinds,
        "sliding_window": window,
        "rope_parameters": parameters,
    }


def glm4(header: Header, name: str) -> Settings:
    for key in ("rope.dimension_sections", "nextn_predict_layers"):
        if header.metadata.get(f"{name}.{key}"):
            raise UserError(f"{header.file}: {name}.{key} is not known to jaxft's {name}")
    return _partly_turned(header, name)


def _partly_turned(header: Header, name: str) -> Settings:
    """Head size, the part of it that turns, rotary scaling and biases."""
    size = header.metadata.get(f"{name}.attention.key_length")
    return {
        **({} if size is None else {"head_dim": size}),
        **_part(header, name),
        **rotary_scaling(header, name),
        "attention_bias": _biased(header, "attn_q"),
    }


def exaone4(header: Header, name: str) -> Settings:
    kinds, window = _kinds(header, name, 4)
    return llama_like(header, name) | {"layer_types": kinds, "sliding_window": window}


def seed_oss(header: Header, name: str) -> Settings:
    return llama_like(header, name) | {
        "attention_bias": _biased(header, "attn_q"),
        "attention_out_bias": _biased(header, "attn_output"),
        "mlp_bias": _biased(header, "ffn_up"),
    }


def cohere2(header: Header, name: str) -> Settings:
    kinds, window = _kinds(header, name, 4)
    scale = header.metadata.get(f"{name}.logit_scale")
    return {
        **rotary_scaling(header, name),
        "attention_bias": _biased(header, "attn_q"),
        "layer_types": kinds,
        "logit_scale": short(scale) if scale else 1.0,
        "sliding_window": window,
    }


def starcoder2(header: Header, name: str) -> Settings:
    window = header.metadata.get(f"{name}.attention.sliding_window") or None
    return rotary_scaling(header, name) | {
        "use_bias": _biased(header, "attn_q"),
        "sliding_window": window,
    }


def stablelm(header: Header, name: str) -> Settings:
    """A block is parallel if its feed-forward has no norm: the file's own key for that is wrong in some sizes."""
    if "blk.0.attn_q_norm.weight" in header.tensors:
        raise UserError(
            f"{header.file}: a norm for each head of {name} is not read from GGUF: take the folder of the 12B"
        )
    return _part(header, name) | {
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors,
        "use_qkv_bias": _biased(header, "attn_q"),
    }


def nemotron(header: Header, name: str) -> Settings:
    return _partly_turned(header, name) | {"mlp_bias": _biased(header, "ffn_up")}
