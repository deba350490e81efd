"""Which architectures of llama.cpp are read and written, and how each says what config.json says.

An `Architecture` is a row: the names of its settings, and what its tensors hold otherwise than those of a Hugging Face
folder. The tensors' names need no table here: the package `gguf` has one. Another family is another row in
`ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.errors import UserError, nearest, shown
from jaxft.formats.gguf.header import Header

Settings = dict[str, Any]
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
GPT2_KEYS = {
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "n_head": "attention.head_count",
    "n_layer": "block_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
# Settings that a file may leave out: without them all heads have keys, and the base is llama.cpp's.
OPTIONAL = {"num_key_value_heads": None, "rope_theta": 10000.0}
ROTARY = "rope_freqs.weight"
# What Llama 3.1 and 3.2 stretch by, beside the factor: (low_freq_factor, high_freq_factor, original length).
LLAMA3 = (1.0, 4.0, 8192)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one architecture stands in a GGUF file.

    Attributes:
        model_type: the family's name in config.json.
        keys: {setting of config.json: key of the file without the architecture before it}.
        fixed: settings that hold for all its files.
        more: Header, prefix of its keys -> further settings.
        permuted: ends of modules whose rows are laid pairwise for its rotary features: q and k of llama.
        offset: norms are stored as 1 + w, where the folder has w.
        turned: ends of modules whose kernels the folder stores as (in, out), and the file as (out, in).
        tokenizer: how its SentencePiece vocabulary is read: "" as llama's.
    """

    model_type: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: KEYS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: Callable[[Header, str], Settings] = lambda header, prefix: {}
    permuted: tuple[str, ...] = ()
    offset: bool = False
    turned: tuple[str, ...] = ()
    tokenizer: str = ""

    def folded(self, name: str, array: np.ndarray, raw: Mapping[str, Any]) -> np.ndarray:
        """A tensor of the file as the folder stores it. Its inverse is `unfolded`.

        Args:
            name: in the folder.
            array: rows first.
            raw: config.json.
        """
        module = name.rpartition(".")[0]
        if module.endswith(self.permuted):
            return _rows(array, _heads(module, raw), 1)
        if self.offset and module.endswith("norm"):
            return (array.astype(np.float32) - 1.0).astype(array.dtype)
        return array.T if self.turns(name) else array

    def permute(self, name: str, array: np.ndarray, raw: Mapping[str, Any]) -> np.ndarray:
        """The rows of a tensor (out, ...) as `unfolded` lays them, its axes and values as they are."""
        module = name.rpartition(".")[0]
        return _rows(array, _heads(module, raw), 0) if module.endswith(self.permuted) else array

    def turns(self, name: str) -> bool:
        """Whether the folder has a tensor's axes the other way round."""
        return name.endswith(tuple(f"{module}.weight" for module in self.turned))

    def unfolded(self, name: str, array: np.ndarray, raw: Mapping[str, Any]) -> np.ndarray:
        """A tensor of the folder as llama.cpp stores it."""
        module = name.rpartition(".")[0]
        if module.endswith(self.permuted):
            return _rows(array, _heads(module, raw), 0)
        if self.offset and module.endswith("norm"):
            return array.astype(np.float32) + 1.0
        return array.T if self.turns(name) else array


def _heads(module: str, raw: Mapping[str, Any]) -> int:
    keys = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    return int(keys if module.endswith("k_proj") else raw["num_attention_heads"])


def _rows(array: np.ndarray, heads: int, pairs: int) -> np.ndarray:
    """The rows of each head, halves (2, n) turned into pairs (n, 2), or, where `pairs`, back."""
    half = array.shape[0] // heads // 2
    sizes = (heads, half, 2) if pairs else (heads, 2, half)
    return array.reshape(*sizes, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """(its name, its row) of a file. Raises UserError for one that is not read."""
    name = header.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{header.file}: the architecture {shown(name)} is not read from GGUF{nearest(name, ARCHITECTURES)}; "
            f"these are: {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def config_of(header: Header) -> Settings:
    """The config.json of a file, without what the tokenizer says.

    Raises:
        UserError: an architecture or a rotary scaling that is not read, or a setting that is missing or no number.
    """
    name, row = architecture_of(header)
    raw: Settings = {"model_type": row.model_type, **row.fixed}
    for setting, key in row.keys.items():
        full = f"{name}.{key}"
        if setting in OPTIONAL and full not in header.metadata:
            value = OPTIONAL[setting]
        else:
            value = header.need(full, (int, float))
        if value is not None:
            raw[setting] = _short(value)
    if "token_embd.weight" not in header.tensors:
        raise UserError(
            f"{header.file}: the tensor token_embd.weight is missing: is it a part of a split file?"
        )
    raw["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    raw["tie_word_embeddings"] = "output.weight" not in header.tensors
    return raw | row.more(header, name)


def _short(value: float) -> float | int:
    """A number that was stored in float32, with the fewest digits that say the same there.

    >>> _short(9.999999747378752e-06), _short(32)
    (1e-05, 32)
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama_like(header: Header, name: str) -> Settings:
    """Head size, biases and rotary scaling."""
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
    return raw | _scaling(header, name)


def _llama(header: Header, name: str) -> Settings:
    for key in ("expert_count", "attention.sliding_window"):
        if header.metadata.get(f"{name}.{key}"):
            raise UserError(f"{header.file}: {name}.{key} is not known to jaxft's llama")
    return _llama_like(header, name) | {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen3(header: Header, name: str) -> Settings:
    return _llama_like(header, name) | {"attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _gemma2(header: Header, name: str) -> Settings:
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


def _gemma3(header: Header, name: str) -> Settings:
    size = header.need(f"{name}.attention.key_length", int)
    heads = header.need(f"{name}.attention.head_count", int)
    hidden = header.need(f"{name}.embedding_length", int)
    layers = header.need(f"{name}.block_count", int)
    scaling = _scaling(header, name)
    if layers > 2**12:
        raise UserError(f"{header.file}: {shown(layers)} is no number for layers")
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]
    theta = {"rope_theta": _short(header.metadata.get(f"{name}.rope.freq_base", 1e6))}
    base = {"rope_theta": _short(header.metadata.get(f"{name}.rope.freq_base_swa", 1e4))}
    full = scaling.get("rope_scaling") or {"rope_type": "default"}
    return {
        "head_dim": size,
        "layer_types": kinds,
        "query_pre_attn_scalar": hidden // heads if layers == 62 else size,  # 62: of 27B
        "rope_parameters": {
            "full_attention": full | theta,
            "sliding_attention": {"rope_type": "default", **base},
        },
        "sliding_window": header.metadata.get(f"{name}.attention.sliding_window", 1024),
    }


def _scaling(header: Header, name: str) -> Settings:
    """The rotary scaling: linear and yarn by their keys, llama3 by the factors that stand as a tensor."""
    prefix = f"{name}.rope.scaling."
    known = {"type", "factor", "original_context_length", "finetuned"}
    found = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    kind = found.get("type", "linear" if "factor" in found else "none")
    if kind not in ("none", "linear", "yarn") or (set(found) - known and kind != "none"):
        odd = ", ".join(sorted(set(found) - known)) or shown(kind)
        raise UserError(f"{header.file}: rotary scaling by {odd} is not read from GGUF")
    if ROTARY in header.tensors:
        return {"rope_scaling": _llama3(header, name)}
    if kind == "none" or found.get("factor", 1.0) == 1.0:
        return {}
    scaling: Settings = {"rope_type": kind, "factor": _short(found["factor"])}
    if kind == "yarn" and "original_context_length" in found:
        scaling["original_max_position_embeddings"] = found["original_context_length"]
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


ARCHITECTURES = {
    "llama": Architecture("llama", more=_llama, permuted=("q_proj", "k_proj")),
    "qwen2": Architecture("qwen2", more=_llama_like),
    "qwen3": Architecture("qwen3", more=_qwen3),
    "gemma2": Architecture("gemma2", more=_gemma2, offset=True, tokenizer="gemma"),
    "gemma3": Architecture("gemma3_text", more=_gemma3, offset=True, tokenizer="gemma"),
    "gpt2": Architecture(
        "gpt2",
        keys=GPT2_KEYS,
        turned=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
}
