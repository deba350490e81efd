"""Which architectures of llama.cpp are read and written, and how each says what config.json says.

An `Architecture` is a row: the names of its settings, and what its tensors hold otherwise than those of a Hugging Face
folder. The tensors' names need no table here: the package `gguf` has one. Another family is another row in
`ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.errors import UserError, nearest, shown
from jaxft.formats.gguf import shapes
from jaxft.formats.gguf.header import Header
from jaxft.formats.gguf.rotary import short
from jaxft.models.config import Config

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
LAYER_NORM = "attention.layer_norm_epsilon"


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
        also: further families that are written as this architecture.
        said: Config -> keys that its files have beside those of all.
    """

    model_type: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: KEYS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: Callable[[Header, str], Settings] = lambda header, prefix: {}
    permuted: tuple[str, ...] = ()
    offset: bool = False
    turned: tuple[str, ...] = ()
    tokenizer: str = ""
    also: tuple[str, ...] = ()
    said: Callable[[Config], Settings] = lambda config: {}

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
        if self.offset and name.endswith("norm.weight"):
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
        if self.offset and name.endswith("norm.weight"):
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
            raw[setting] = short(value)
    if "token_embd.weight" not in header.tensors:
        raise UserError(
            f"{header.file}: the tensor token_embd.weight is missing: is it a part of a split file?"
        )
    raw["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    raw["tie_word_embeddings"] = "output.weight" not in header.tensors
    return raw | row.more(header, name)


def _layer_normed(setting: str) -> dict[str, str]:
    """`KEYS` of a family whose norms subtract the mean."""
    return {key: one for key, one in KEYS.items() if key != "rms_norm_eps"} | {setting: LAYER_NORM}


def _scales(config: Config) -> Settings:
    return {
        "attention.scale": float(config.query_scale),
        "embedding_scale": float(config.embedding_scale),
        "residual_scale": float(config.residual_scale),
        "logit_scale": 1.0 / config.logit_scale,
    }


def _pattern(config: Config) -> Settings:
    windows = [bool(window) for window in config.windows]
    return {"attention.sliding_window_pattern": windows} if windows else {}


def _olmo(config: Config) -> Settings:
    """The base of the layers with a window, though it be that of all."""
    alike = config.windows and not config.rotaries
    return _pattern(config) | ({"rope.freq_base_swa": float(config.rope_theta)} if alike else {})


def _phi(config: Config) -> Settings:
    """A window of 0, by which llama.cpp knows Phi-4, and an original length though nothing is scaled."""
    plain = (
        {} if config.rope_scaling else {"rope.scaling.original_context_length": config.max_length}
    )
    return {"attention.sliding_window": max(config.windows, default=0), **plain}


def _grown(config: Config) -> Settings:
    return {"attention.temperature_scale": config.query_growth[0]} if config.query_growth else {}


LLAMA_ROWS = ("q_proj", "k_proj")
ARCHITECTURES = {
    "llama": Architecture("llama", more=shapes.llama, permuted=LLAMA_ROWS, also=("mistral",)),
    "mistral3": Architecture("ministral3", more=shapes.mistral3, permuted=LLAMA_ROWS, said=_grown),
    "qwen2": Architecture("qwen2", more=shapes.llama_like),
    "qwen3": Architecture("qwen3", more=shapes.qwen3),
    "gemma": Architecture("gemma", more=shapes.gemma, offset=True, tokenizer="gemma"),
    "gemma2": Architecture("gemma2", more=shapes.gemma2, offset=True, tokenizer="gemma"),
    "gemma3": Architecture("gemma3_text", more=shapes.gemma3, offset=True, tokenizer="gemma"),
    "phi3": Architecture("phi3", more=shapes.phi3, said=_phi),
    "smollm3": Architecture("smollm3", more=shapes.smollm3, permuted=LLAMA_ROWS),
    "granite": Architecture("granite", more=shapes.granite, permuted=LLAMA_ROWS, said=_scales),
    "olmo2": Architecture("olmo2", more=shapes.olmo2, also=("olmo3",), said=_olmo),
    "glm4": Architecture("glm4", more=shapes.glm4),
    "exaone4": Architecture("exaone4", more=shapes.exaone4, said=_pattern),
    "seed_oss": Architecture("seed_oss", more=shapes.seed_oss),
    "cohere2": Architecture(
        "cohere2",
        keys=_layer_normed("layer_norm_eps"),
        more=shapes.cohere2,
        said=lambda config: {"logit_scale": float(config.logit_scale)},
    ),
    "starcoder2": Architecture(
        "starcoder2", keys=_layer_normed("norm_epsilon"), more=shapes.starcoder2
    ),
    "stablelm": Architecture(
        "stablelm",
        keys=_layer_normed("layer_norm_eps"),
        more=shapes.stablelm,
        said=lambda config: {"use_parallel_residual": config.norm_place == "parallel"},
    ),
    "nemotron": Architecture(
        "nemotron", keys=_layer_normed("norm_eps"), more=shapes.nemotron, offset=True
    ),
    "gpt2": Architecture(
        "gpt2",
        keys=GPT2_KEYS,
        turned=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
}
