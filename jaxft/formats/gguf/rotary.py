"""The rotary scaling of a GGUF file: linear and yarn stand in its keys, llama3 and longrope as tensors of factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxft.errors import UserError, shown
from jaxft.formats.gguf.header import Header
from jaxft.models.config import Rotary

Settings = dict[str, Any]
ROTARY = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# What Llama 3.1 and 3.2 stretch by, beside the factor: (low_freq_factor, high_freq_factor, original length).
LLAMA3 = (1.0, 4.0, 8192)
# {setting of yarn: its key below `rope.scaling.`}
YARN = {
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale_all_dim": "yarn_log_multiplier",
}
KNOWN = {"type", "factor", "finetuned", "attn_factor", *YARN.values()}


def short(value: Any) -> Any:
    """A number that was stored in float32, with the fewest digits that say the same there.

    >>> short(9.999999747378752e-06), short(32)
    (1e-05, 32)
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rotary_scaling(header: Header, name: str) -> Settings:
    """{"rope_scaling": ...} of a file, {} for none.

    Args:
        header: of the file.
        name: of its architecture.

    Raises:
        UserError: the file names a scaling that jaxft does not know, or has factors that config.json cannot say.
    """
    prefix = f"{name}.rope.scaling."
    found = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    kind = found.get("type", "linear" if "factor" in found else "none")
    if kind not in ("none", "linear", "yarn") or (set(found) - KNOWN and kind != "none"):
        odd = ", ".join(sorted(set(found) - KNOWN)) or shown(kind)
        raise UserError(f"{header.file}: rotary scaling by {odd} is not read from GGUF")
    if ROTARY in header.tensors:
        return {"rope_scaling": _llama3(header, name)}
    if kind == "none" or found.get("factor", 1.0) == 1.0:
        return {}
    scaling: Settings = {"rope_type": kind, "factor": short(found["factor"])}
    if kind == "yarn":
        scaling |= {key: short(found[one]) for key, one in YARN.items() if one in found}
    return {"rope_scaling": scaling}


def llama3_factors(
    dim: int, theta: float, factor: float, low: float, high: float, length: int
) -> np.ndarray:
    """(dim / 2,): by what Llama 3.1 divides each rotary frequency: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3(header: Header, name: str) -> Settings:
    """The settings behind factors that stand as numbers alone; UserError where they are not Llama 3's."""
    factors = header.tensors[ROTARY].read().astype(np.float64)
    theta = header.metadata.get(f"{name}.rope.freq_base", 10000.0)
    low, high, length = LLAMA3
    factor = round(float(factors.max()), 3)
    if not np.isfinite(factor) or factor < 1 or factors.ndim != 1:
        raise UserError(f"{header.file}: {ROTARY} holds no factors")
    made = llama3_factors(2 * factors.size, theta, factor, low, high, length)
    if not np.allclose(made, factors, rtol=1e-4):
        raise UserError(
            f"{header.file}: {ROTARY} holds factors that are not Llama 3.1's: jaxft cannot say them in config.json"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def longrope_scaling(header: Header, name: str) -> Settings:
    """{"rope_scaling": ...} of phi3: longrope where its factors stand as tensors, {} where they do not."""
    if LONG not in header.tensors or SHORT not in header.tensors:
        return {}
    long, brief = (
        [short(float(x)) for x in header.tensors[key].read().ravel()] for key in (LONG, SHORT)
    )
    scaling: Settings = {"rope_type": "longrope", "long_factor": long, "short_factor": brief}
    length = header.need(f"{name}.context_length", int)
    original = header.need(f"{name}.rope.scaling.original_context_length", int)
    factor = header.metadata.get(f"{name}.rope.scaling.attn_factor")
    if factor is not None and not math.isclose(factor, _growth(length, original), rel_tol=1e-5):
        scaling["attention_factor"] = short(factor)
    return {"rope_scaling": scaling}


def _growth(length: int, original: int) -> float:
    """longrope's factor of cosine and sine, where no setting gives another."""
    if original < 2 or length <= original:
        return 1.0
    return math.sqrt(1 + math.log(length / original) / math.log(original))


def said_scaling(
    rotary: Rotary, dim: int, max_length: int
) -> tuple[Settings, dict[str, np.ndarray]]:
    """(the keys below `rope.scaling.`, tensors of factors) that a scaling is written as.

    Args:
        rotary: the base and the scaling.
        dim: features of a head that turn.
        max_length: the model's.
    """
    scaling = dict(rotary.scaling)
    kind = scaling.get("rope_type")
    if kind == "llama3":
        factors = llama3_factors(dim, rotary.theta, float(scaling["factor"]), *LLAMA3)
        return {}, {ROTARY: factors.astype(np.float32)}
    if kind == "longrope":
        original = int(scaling["original_max_position_embeddings"])
        growth = scaling.get("attention_factor") or _growth(max_length, original)
        arrays = {LONG: scaling["long_factor"], SHORT: scaling["short_factor"]}
        grown: Settings = {"attn_factor": float(growth), "original_context_length": original}
        return grown, {key: np.asarray(x, np.float32) for key, x in arrays.items()}
    if not scaling:
        return {}, {}
    said: Settings = {"type": str(kind), "factor": float(scaling.get("factor") or 1.0)}
    for key, one in YARN.items():
        if (value := scaling.get(key)) is not None:
            said[one] = int(value) if one == "original_context_length" else float(value)
    return said, {}
