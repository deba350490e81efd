"""config.json: read as a `Config`, written from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.formats.safetensors import read_json
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, family_of

SIZES = (
    "vocabulary",
    "hidden",
    "intermediate",
    "layers",
    "heads",
    "key_heads",
    "head_dim",
    "max_length",
)
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's config.json. Raises UserError if it is missing, broken, or wants code run."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; a model is a folder with config.json and safetensors"
        )
    file = path / "config.json"
    if not file.exists():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "no files"
        raise UserError(f"{path}: no config.json; there are: {there}")
    raw = read_json(file)
    for key in ("auto_map", "trust_remote_code"):
        if raw.get(key):
            raise UserError(
                f"{file}: {key} asks for code of the folder's own, which jaxft never runs"
            )
    method = (raw.get("quantization_config") or {"quant_method": "bitsandbytes"}).get(
        "quant_method"
    )
    if method != "bitsandbytes":
        raise UserError(
            f"{file}: quantization_config: quant_method {method!r} is not known to jaxft, which reads bitsandbytes; "
            "give the dense model's folder"
        )
    return raw


def model_config(folder: str | Path) -> Config:
    """The decoder's shape from a folder's config.json alone.

    Raises:
        UserError: no config.json, a broken one, or an architecture that jaxft does not know.
    """
    raw = read_config(folder)
    where = str(Path(folder) / "config.json")
    family = family_of(raw.get("model_type"), where)
    try:
        config = family.read(raw)
    except KeyError as error:
        raise UserError(
            f"{where}: no {error.args[0]!r}{nearest(str(error.args[0]), raw)}"
        ) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value of a wrong kind: {error}") from error
    for size in SIZES:
        value = getattr(config, size)
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {value!r} is no number for {size}")
    if config.heads % config.key_heads:
        raise UserError(
            f"{where}: {config.heads} heads do not divide among {config.key_heads} key heads"
        )
    return config


def config_json(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers reads as this shape."""
    common = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,  # the tokenizer's, which a shape does not know
        "eos_token_id": None,
        "dtype": dtype,
    }
    return common | (_gpt2(config) if config.family == "gpt2" else _llama_like(config))


def _gpt2(config: Config) -> dict[str, Any]:
    return {
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_inner": config.intermediate,
        "n_layer": config.layers,
        "n_positions": config.max_length,
        "scale_attn_weights": config.query_scale != 1.0,
    }


def _llama_like(config: Config) -> dict[str, Any]:
    shape = {
        "head_dim": config.head_dim,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.key_heads,
        "rms_norm_eps": config.norm_epsilon,
    } | _rope(config)
    own: Mapping[str, Any] = {"llama": _llama, "qwen2": _qwen2, "gemma2": _gemma2}
    return shape | own[config.family](config)


def _rope(config: Config) -> dict[str, Any]:
    if not config.rope_scaling:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    names = {"type": "rope_type"}  # as older files spell it
    scaling = {names.get(key, key): value for key, value in config.rope_scaling}
    return {"rope_parameters": scaling | {"rope_theta": config.rope_theta}}


def _llama(config: Config) -> dict[str, Any]:
    return {
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _kinds(config: Config) -> list[str]:
    windows = config.windows or (0,) * config.layers
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _qwen2(config: Config) -> dict[str, Any]:
    return {
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_types": _kinds(config),
        "sliding_window": max(config.windows) if config.windows else None,
        "use_sliding_window": bool(config.windows),
    }


def _gemma2(config: Config) -> dict[str, Any]:
    return {
        "hidden_activation": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": _kinds(config),
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "sliding_window": max(config.windows) if config.windows else None,
    }
