"""config.json: read as a `Config`, written from one."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError, counted, named, nearest, shown
from jaxft.formats.adapter_config import FILE as ADAPTER
from jaxft.formats.multimodal import text_of
from jaxft.formats.prequantized import check_quantization
from jaxft.formats.safetensors import weights_file
from jaxft.models.config import Config, Rotary
from jaxft.models.families import FAMILIES, family_of
from jaxft.models.families.common import FULL, SLIDING
from jaxft.models.frequencies import long_frequencies, rope_frequencies
from jaxft.models.segments import original_lengths, segments_of
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
    "residual_scale": (1e-6, 1e6),
    "logit_scale": (1e-9, 1e6),
}

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
    raw = text_of(read_config(folder))
    where = str(Path(folder) / "config.json")
    family = family_of(raw.get("model_type"), where, raw)
    for key in ("num_hidden_layers", "n_layer"):  # before a list of the layers is made of it
        if type(raw.get(key)) is int and raw[key] > LARGEST["layers"]:
            raise UserError(f"{where}: {shown(raw[key])} is no number for layers")
    _check_kinds(raw, where)
    try:
        config = family.read(raw)
        for own in (config, *(segment.config for segment in segments_of(config))):
            _check_shape(own, where)
            _check_rotary(own, where)
        if len(lengths := original_lengths(config)) > 1:
            both = " and ".join(map(str, sorted(lengths)))
            raise UserError(
                f"{where}: longrope with original lengths of {both}: jaxft knows one for all kinds of layers"
            )
    except UserError as error:  # a family knows config.json, and not whose it is
        said = str(error).removeprefix("config.json")
        raise UserError(said if said == str(error) else where + said) from error
    except KeyError as error:
        key = str(error.args[0])
        raise UserError(f"{where}: no {shown(key)}{nearest(key, raw)}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {_no_number(raw) or str(error)[:200]}") from error
    return config


def _check_kinds(raw: Mapping[str, Any], where: str) -> None:
    """UserError where `layer_types` has kinds that no family has, or is of another number of layers."""
    kinds = raw.get("layer_types")
    if not isinstance(kinds, list):
        return
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise UserError(
                f"{where}: layer_types: unknown kind {shown(kind)}; jaxft knows {SLIDING} and {FULL}"
            )
    layers = raw.get("num_hidden_layers", len(kinds))
    if layers != len(kinds):
        has = counted(len(kinds), "layer")
        raise UserError(f"{where}: layer_types has {has}, and num_hidden_layers is {shown(layers)}")


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
    for window in config.windows:
        if type(window) is not int or not 0 <= window < 2**31:
            raise UserError(f"{where}: {shown(window)} is no number for sliding_window")
    if config.windows and len(config.windows) != config.layers:
        kinds = counted(len(config.windows), "layer")
        raise UserError(f"{where}: layer_types has {kinds}, and there are {config.layers}")


def _check_rotary(config: Config, where: str) -> None:
    """The rotary frequencies can be computed, and are numbers."""
    if config.positions != "rotary":
        return
    size = config.rotary_dim or config.head_dim
    if size % 2 or size > config.head_dim:
        partly = f"{size} of " if config.rotary_dim else ""
        raise UserError(
            f"{where}: head_dim {partly}{config.head_dim} is odd, and rotary features pair"
            if size % 2
            else f"{where}: {size} rotary features are more than a head's {config.head_dim}"
        )
    if config.rotaries and len(config.rotaries) != config.layers:
        raise UserError(f"{where}: {config.layers} layers need as many kinds of rotary")
    own = [one for one in dict.fromkeys(config.rotaries) if one]
    for rotary in own or [Rotary(config.rope_theta, config.rope_scaling)]:
        _check_angles(rotary, size, config.max_length, where)


def _check_angles(rotary: Rotary, size: int, max_length: int, where: str) -> None:
    """UserError where these settings give no angles."""
    low, high = NUMBERS["rope_theta"]
    if type(rotary.theta) not in (int, float) or not low <= rotary.theta <= high:
        raise UserError(f"{where}: {shown(rotary.theta)} is no number for rope_theta")
    scaling = dict(rotary.scaling)
    wrong = [key for key, value in scaling.items() if not _is_setting(key, value)]
    plain = scaling | dict.fromkeys(wrong, 1.0)
    try:
        with np.errstate(all="ignore"):  # an unknown kind is told before what it holds
            frequencies, factor = rope_frequencies(size, rotary.theta, plain, max_length)
            long = long_frequencies(size, rotary.theta, plain)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for key in wrong:
        takes = f"{named(key)} takes a number or a text, not {shown(scaling[key])}"
        raise UserError(f"{where}: rope_scaling: {takes}")
    found = frequencies if long is None else np.concatenate([frequencies, long])
    if not (np.isfinite(found).all() and math.isfinite(factor)):
        raise UserError(f"{where}: the rope settings give frequencies that are no numbers")


def _is_setting(key: str, value: Any) -> bool:
    """A number or a text; of longrope's two lists, numbers, one for each pair of features."""
    if isinstance(value, tuple):
        return key in ("short_factor", "long_factor") and all(
            type(one) in (int, float) for one in value
        )
    return isinstance(value, str | int | float)


def config_json(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers reads as this shape."""
    family = FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,  # the tokenizer's, which a shape does not know
        "eos_token_id": None,
        "dtype": dtype,
        **family.write(config),
    }


def needed_by_transformers(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What transformers asks for of the family that this config.json lacks."""
    return FAMILIES[config.family].needed(raw, config)
