"""Texts to vectors: the mean of static embeddings of words, or of a model's hidden states."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.assets import model_folder
from jaxft.data.literal import literal
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError
from jaxft.formats.manifest import BASE, TOKENIZER, fingerprint
from jaxft.retrieval.vectors import Embed, unit

STATIC = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")
ROWS = 16  # texts that a model reads at once: always as many, so that a vector does not depend on its neighbours


def static_embedding() -> tuple[Embed, dict[str, str]]:
    """Mean embeddings of wordllama's 256 dimensions, read from its wheel; and the sha256 of its files.

    The package itself is not imported: it would ask the network for its tokenizer.

    Raises:
        UserError: wordllama is not installed, or holds other files.
    """
    found = importlib.util.find_spec("wordllama")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "static embeddings need the package wordllama, which is not installed: pip install 'jaxft[static]'"
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    missing = [name for name in STATIC if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no {missing[0]}: this wordllama is of another version than 0.4")
    return _static(folder), fingerprint(folder, STATIC)


@functools.cache
def _static(folder: Path) -> Embed:
    import tokenizers
    from safetensors.numpy import load_file

    weights, words = (folder / name for name in STATIC)
    table = load_file(weights)["embedding.weight"].astype(np.float32)
    backend = tokenizers.Tokenizer.from_file(str(words))
    backend.no_padding()
    backend.no_truncation()

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), table.shape[1]), np.float32)
        encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            if encoding.ids:
                row[:] = table[np.minimum(encoding.ids, len(table) - 1)].mean(axis=0)
        return unit(rows)

    return embed


@functools.cache
def _read() -> Embed:
    embed, _ = static_embedding()
    return embed


def embedded(texts: Sequence[str]) -> np.ndarray:
    """(texts, 256) float32: `static_embedding` of each; its files are read once in a process."""
    return _read()(texts)


def model_embedding(name: str, length: int) -> tuple[Embed, dict[str, str]]:
    """Mean hidden states, behind the last norm, of a model's folder; and the sha256 of its files.

    Args:
        name: a Hugging Face folder, or "tiny".
        length: tokens that are read of a text, at most; no more than the model's longest.
    """
    from jaxft.formats import load

    folder = model_folder(name)
    model, params = load(folder)
    tokenizer = load_tokenizer(folder)
    longest = min(length, model.config.max_length)
    known = fingerprint(folder, (*BASE, *TOKENIZER))
    return functools.partial(_hidden_means, model.config, params, tokenizer, longest), known


def _hidden_means(
    config: Any, params: Any, tokenizer: Tokenizer, longest: int, texts: Sequence[str]
) -> np.ndarray:
    encoded = tokenizer.encode_all([literal(text, tokenizer) for text in texts])
    means = np.zeros((len(texts), config.hidden), np.float32)
    for start in range(0, len(texts), ROWS):
        tokens, segments = np.zeros((2, ROWS, longest), np.int32)
        for row, ids in enumerate(encoded[start : start + ROWS]):
            tokens[row, : len(ids[:longest])] = ids[:longest]
            segments[row, : len(ids[:longest])] = 1
        found = np.asarray(_means(config)(params, tokens, segments))
        means[start : start + ROWS] = found[: len(texts) - start]
    return unit(means)


@functools.cache
def _means(config: Any) -> Any:
    """(params, tokens, segments) -> the mean of each row's hidden states, (rows, hidden) float32."""
    import jax
    import jax.numpy as jnp

    from jaxft.models import hidden_states

    @jax.jit
    def means(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        hidden = hidden_states(config, params, tokens, segments).astype(jnp.float32)
        read = jnp.expand_dims(segments > 0, -1).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(read, axis=1), 1.0)
        return jnp.sum(hidden * read, axis=1) / count

    return means
