"""Hugging Face folders, written from a parameter tree. `huggingface` reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError, nearest
from jaxft.formats.bitsandbytes import (
    check_writable,
    config_of,
    parts_of,
    read_layers,
    skip_list,
    written,
)
from jaxft.formats.companions import lay_beside
from jaxft.formats.config_file import config_json, needed_by_transformers, read_config
from jaxft.formats.huggingface import HEAD, names_of, sizes_of, spelling, unused
from jaxft.formats.manifest import write_manifest
from jaxft.formats.multimodal import TEXT, text_of
from jaxft.formats.prequantized import Settings, stored_by_bitsandbytes
from jaxft.formats.safetensors import (
    SHARD_BYTES,
    Lazy,
    Stored,
    new_folder,
    open_folder,
    write_folder,
    write_json,
)
from jaxft.formats.streamed import dense_kernel
from jaxft.models.config import Config
from jaxft.models.families import tensors_of
from jaxft.models.transformer import Transformer, fitted
from jaxft.runtime.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths, in_layers
from jaxft.weights import (
    Weight,
    is_encoded,
    is_tied_head,
    is_weight,
    merged_one,
    weights_of,
)


def save(
    model: Transformer,
    params: PyTree,
    folder: str | Path,
    *,
    like: str | Path | None = None,
    beside: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a tree without adapters as a Hugging Face folder that transformers loads.

    Args:
        model: the module, whose config says the family and the shape.
        params: the tree; adapters must be merged before (`jaxft.merge`). Quantized weights are written as
            bitsandbytes does.
        folder: a new or empty folder.
        like: the folder the model was read from, whose config.json, tokenizer and division into
            files are kept.
        beside: the folder of the adapter that was merged, whose tokenizer, chat template and generation settings
            then count before those of `like`.
        dtype: what to store; by default what the leaves have.
        shard_bytes: the size from which on the model is divided, where `like` says nothing.

    Raises:
        UserError: the tree holds adapters, or the folder is not empty.
    """
    for path, weight in weights_of(params):
        if is_encoded(weight):
            check_writable(weight)
        elif not is_tied_head(weight):
            kind = type(weight).__name__
            raise UserError(
                f"save: {path} holds an adapter ({kind}): call jaxft.merge(params) first"
            )
    options: dict[str, Any] = {"beside": beside, "dtype": dtype, "shard_bytes": shard_bytes}
    write_model(model.config, params, folder, like=like, **options)


def write_model(
    config: Config,
    params: PyTree,
    folder: str | Path,
    *,
    like: str | Path | None = None,
    beside: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dense: bool = False,
) -> None:
    """`save`, for a tree whose weights are merged one by one while they are written; quantized ones too if `dense`."""
    target = new_folder(folder)
    config = dataclasses.replace(fitted(config, params), tied=_is_tied(params))
    raw = dict(read_config(like) if like else config_json(config))
    before = stored_by_bitsandbytes(raw, str(like))
    source = open_folder(Path(like)) if like else {}
    kept = {} if dense or before is None else _still_quantized(config, params, source, before)
    tensors = _to_write(config, params, source, dtype, dense, kept)
    counts = {str(tensor.dtype) for tensor in tensors.values()}
    stored_dtype = str(tensors[next(iter(tensors))].dtype) if len(counts) == 1 else "float32"
    raw.pop("quantization_config", None)
    raw.pop("transformers_weights", None)
    quantized = [leaf for _, leaf in weights_of(params) if is_encoded(leaf)]
    quantized += kept.values()
    if quantized and not dense:
        stored_dtype = str(np.dtype(quantized[0].dtype))
        skipped = skip_list(*_modules(config, tensors, spelling(config, source or tensors)), before)
        raw["quantization_config"] = config_of(quantized[0], stored_dtype, skipped, before)
    dtype_key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    raw |= needed_by_transformers(text_of(raw), config)
    raw |= _resized(raw, config)
    write_json(
        target / "config.json", raw | {dtype_key: stored_dtype, "tie_word_embeddings": config.tied}
    )
    tensors |= _kept_as_they_are(config, source)
    write_folder(target, tensors, {name: s.file.name for name, s in source.items()}, shard_bytes)
    if like:
        lay_beside(target, Path(like), Path(beside) if beside else None)
    write_manifest(target)


def _resized(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What config.json says of a vocabulary that has other rows than it had."""
    if text_of(raw)["vocab_size"] == config.vocabulary:
        return {}
    size = {"vocab_size": config.vocabulary}
    return {TEXT: {**raw[TEXT], **size}} if isinstance(raw.get(TEXT), Mapping) else size


def _is_tied(params: PyTree) -> bool:
    """Whether the head is still the embedding once all is merged."""
    head = params["head"]["kernel"]
    if not is_tied_head(head):
        return False
    bound = head.bind(params)
    return bound.base is params["embed"]["embedding"]


def dense_tensors(config: Config, params: PyTree) -> dict[str, Lazy]:
    """{name on disk: tensor} of a tree, its adapters merged and its codes dequantized as each is made."""
    tied = dataclasses.replace(fitted(config, params), tied=_is_tied(params))
    return _to_write(tied, params, {}, None, dense=True, kept={})


def _to_write(
    config: Config,
    params: PyTree,
    source: Mapping[str, Stored],
    dtype: str | None,
    dense: bool,
    kept: Mapping[str, Weight],
) -> dict[str, Lazy]:
    """{name on disk: tensor}, each made when it is written."""
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    spelled = spelling(config, source) if source else lambda name: name
    tensors: dict[str, Lazy] = {}
    for path, tensor in tensors_of(config).items():
        if path not in leaves:
            raise UserError(f"save: the tree has no {path}{nearest(path, leaves)}")
        leaf = leaves[path]
        wanted = np.dtype(jnp.dtype(dtype or leaf.dtype))
        shape = sizes_of(config)[path]
        lead = tuple(leaf.shape[: len(leaf.shape) - len(shape)])
        for index, name in zip(np.ndindex(lead), names_of(tensor, config, path), strict=True):
            if is_encoded(leaf) and not dense:
                tensors |= written(spelled(name), _at(leaf, index))
                continue
            if name in kept:
                tensors |= written(spelled(name), kept[name])
                continue
            make = _maker(leaf, index, tensor.transposed, params, wanted)
            on_disk = shape[::-1] if tensor.transposed else shape
            tensors[spelled(name)] = Lazy(on_disk, wanted, make)
    if config.tied and spelled(HEAD) in source:
        embedding = tensors_of(config)["embed/embedding"].name
        tensors[spelled(HEAD)] = tensors[spelled(embedding)]
    return tensors


def _kept_as_they_are(config: Config, source: Mapping[str, Stored]) -> dict[str, Lazy]:
    """The tensors of a folder's other parts than the decoder, as they are stored."""
    return {
        name: Lazy(source[name].shape, source[name].numpy, source[name].read)
        for name in unused(config, source)
    }


def _still_quantized(
    config: Config, params: PyTree, source: Mapping[str, Stored], before: Settings
) -> dict[str, Weight]:
    """{name: weight} of the layers that are quantized in the folder, and dense and unchanged in the tree.

    Such are those of leaves of which the folder quantizes only some layers: `load` holds them dense.
    """
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    spelled = spelling(config, source)
    found: dict[str, Weight] = {}
    for path, tensor in tensors_of(config).items():
        leaf = leaves.get(path)
        if leaf is None or is_weight(leaf) or not in_layers(path):
            continue
        names = names_of(tensor, config, path)
        there = [bool(parts_of(source, spelled(name))) for name in names]
        for layer, name in enumerate(names):
            if there[layer] and not all(there):
                one = read_layers(
                    before, source, [spelled(name)], tuple(leaf.shape[1:]), leaf.dtype
                )
                weight = next(one)
                if np.array_equal(dense_kernel(weight), to_host(leaf[layer])):
                    found[name] = weight
    return found


def _modules(
    config: Config, tensors: Mapping[str, Lazy], spelled: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """The names of the modules that are written dense, and of those that are written quantized."""
    dense: list[str] = []
    quantized: list[str] = []
    for path, tensor in tensors_of(config).items():
        if path.endswith("/kernel"):
            for name in names_of(tensor, config, path):
                module = name.removesuffix(".weight")
                there = {f"{spelled(name)}.absmax", f"{spelled(module)}.SCB"} & tensors.keys()
                (quantized if there else dense).append(module)
    return ([*dense, "lm_head"] if config.tied else dense), quantized


def _at(leaf: Any, index: tuple[int, ...]) -> Any:
    """The array or weight at an index of the axes of layers and experts; the leaf itself where it has none."""
    return jax.tree.map(lambda part: part[index], leaf) if index else leaf


def _maker(
    leaf: Any, index: tuple[int, ...], transposed: bool, params: PyTree, dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        dense = merged_one(_at(leaf, index), params)
        array = to_host(dense).astype(dtype, copy=False)
        return array.T if transposed else array

    return make
