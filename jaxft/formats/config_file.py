"""config.json: read as a `Config`, written from one."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError, named, nearest, shown
from jaxft.formats.adapter_config import FILE as ADAPTER
from jaxft.formats.prequantized import check_quantization
from jaxft.formats.safetensors import weights_file
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, family_of
from jaxft.models.layers import rope_frequencies
from jaxft.runtime.untrusted import exists, file_of, read_json

# The largest values that are taken for a model's: far above any that there is.
LARGEST = {
    "vocabulary": 2**24,
    "hidden": 2**20,
    "intermediate": 2**22,
    "layers": 2**12,
    "heads": 2**14,
    "key_heads": 2**14,
    "head_dim": 2**14,
    "max_length": 2**31 - 1,
}
NUMBERS = {
    "norm_epsilon": (0.0, 1.0),
    "rope_theta": (1e-6, 1e15),
    "query_scale": (1e-6, 1e6),
    "attention_softcap": (1e-6, 1e9),
    "logit_softcap": (1e-6, 1e9),
    "embedding_scale": (1e-6, 1e6),
}
GEMMA2_WINDOW = 4096  # of transformers where config.json has none
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# How the names of settings end that are numbers.
NUMERIC = (
    "_size",
    "_heads",
    "_layers",
    "_dim",
    "_theta",
    "_eps",
    "_epsilon",
    "_embd",
    "_head",
    "_layer",
    "_inner",
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's config.json. Raises UserError if it is missing, broken, or wants code run."""
    adapted = exists(Path(folder) / ADAPTER)
    if adapted and not exists(Path(folder) / "config.json"):
        raise UserError(
            f"{folder}: is an adapter ({ADAPTER}): name its base as the model, and this folder as adapter"
        )
    file = file_of(
        Path(folder), "config.json", "a model is a folder with config.json and safetensors"
    )
    raw = read_json(file)
    _check_weights_name(raw, file)
    if adapted:
        _tell_adapter(str(folder))
    for key in ("auto_map", "trust_remote_code"):
        if raw.get(key):
            raise UserError(
                f"{file}: {key} asks for code of the folder's own, which jaxft never runs"
            )
    check_quantization(raw, str(file))
    return raw


def _check_weights_name(raw: Mapping[str, Any], file: Path) -> None:
    """UserError where transformers would read other files than those that are read here."""
    wanted = raw.get("transformers_weights")
    if wanted and exists(file.parent / str(wanted)):
        chosen = weights_file(file.parent)
        if wanted != chosen.name:
            raise UserError(
                f"{file}: transformers_weights names {shown(wanted)}, and jaxft reads {chosen.name}: "
                "take away that file, or that key"
            )


@functools.lru_cache(maxsize=256)
def _tell_adapter(folder: str) -> None:
    """Says once that an adapter in a model's folder is not put on, as transformers does where PEFT is installed."""
    print(
        f"jaxft: {folder} holds an adapter beside the model ({ADAPTER}), which transformers puts on and jaxft does "
        "not: to have it, name the folder as adapter too",
        file=sys.stderr,
    )


def model_config(folder: str | Path) -> Config:
    """The decoder's shape from a folder's config.json alone.

    Raises:
        UserError: no config.json, a broken one, or an architecture that jaxft does not know.
    """
    raw = read_config(folder)
    where = str(Path(folder) / "config.json")
    family = family_of(raw.get("model_type"), where)
    for key in ("num_hidden_layers", "n_layer"):  # before a list of the layers is made of it
        if type(raw.get(key)) is int and raw[key] > LARGEST["layers"]:
            raise UserError(f"{where}: {shown(raw[key])} is no number for layers")
    try:
        config = family.read(raw)
        _check_shape(config, where)
        _check_rotary(config, where)
    except KeyError as error:
        key = str(error.args[0])
        raise UserError(f"{where}: no {shown(key)}{nearest(key, raw)}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {_no_number(raw) or str(error)[:200]}") from error
    return config


def _no_number(raw: Mapping[str, Any]) -> str:
    """The first setting that should be a number, by its name, and is a text or a list; "" where all are numbers."""
    for key, value in raw.items():
        if key.endswith(NUMERIC) and isinstance(value, str | list | dict):
            return f"{key} takes a number, not {shown(value)}"
    return ""


def _check_shape(config: Config, where: str) -> None:
    """UserError for a size or a number that no model has: NaN, no number, or out of all proportion."""
    for size, most in LARGEST.items():
        value = getattr(config, size)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{where}: {shown(value)} is no number for {size}")
    for name, (low, high) in NUMBERS.items():
        value = getattr(config, name)
        if name.endswith("softcap") and value is None:
            continue
        if type(value) not in (int, float) or not low <= value <= high:
            raise UserError(f"{where}: {shown(value)} is no number for {name}")
    if config.heads % config.key_heads:
        raise UserError(
            f"{where}: {config.heads} heads do not divide among {config.key_heads} key heads"
        )
    windows = config.windows
    if windows and (
        len(windows) != config.layers
        or not all(type(window) is int and 0 <= window < 2**31 for window in windows)
    ):
        raise UserError(f"{where}: {config.layers} layers need as many kinds and a whole window")


def _check_rotary(config: Config, where: str) -> None:
    """The rotary frequencies can be computed, and are numbers."""
    if config.positions != "rotary":
        return
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim {config.head_dim} is odd, and rotary features pair")
    scaling = dict(config.rope_scaling)
    wrong = [key for key, value in scaling.items() if not isinstance(value, str | int | float)]
    plain = scaling | dict.fromkeys(wrong, 1.0)
    try:
        with np.errstate(all="ignore"):  # an unknown kind is told before what it holds
            frequencies, factor = rope_frequencies(
                config.head_dim, config.rope_theta, plain, config.max_length
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for key in wrong:
        takes = f"{named(key)} takes a number or a text, not {shown(scaling[key])}"
        raise UserError(f"{where}: rope_scaling: {takes}")
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise UserError(f"{where}: the rope settings give frequencies that are no numbers")


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
        "sliding_window": max(config.windows) if config.windows else GEMMA2_WINDOW,
    }


def windows_needed(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What a config.json lacks for transformers, whose gemma2 needs a window where no layer has one too."""
    if config.family != "gemma2" or raw.get("sliding_window", GEMMA2_WINDOW):
        return {}
    return {"sliding_window": GEMMA2_WINDOW, "layer_types": _kinds(config)}
