"""Hugging Face folders: streamed into a parameter tree, and written from one."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.adaptation import targeted
from jaxft.assets import model_folder
from jaxft.errors import UserError, nearest
from jaxft.files import stays_inside
from jaxft.formats.bitsandbytes import check_writable, config_of, parts_of, read_weight, written
from jaxft.formats.config_file import config_json, model_config, read_config
from jaxft.formats.manifest import check_manifest, write_manifest
from jaxft.formats.quantizing import round_tensor, stacked_on_devices
from jaxft.formats.safetensors import (
    SHARD_BYTES,
    Lazy,
    Stored,
    expect,
    new_folder,
    open_folder,
    write_folder,
    write_json,
)
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, Tensor, tensors_of
from jaxft.models.transformer import Transformer, initial_params, tied_head
from jaxft.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights import Tied, Weight, is_weight, weights_of

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
DTYPES = ("float32", "bfloat16", "float16")
HEAD = "lm_head.weight"
# What stands beside the weights and goes along with them.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*",
)  # fmt: skip


def load(
    folder: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    shardings: Shardings | None = None,
    quantize: str = "none",
    group_size: int = 64,
    double_quant: bool = True,
) -> tuple[Transformer, PyTree]:
    """Reads a Hugging Face folder: the Flax module and its parameter tree.

    Tensors stream one at a time from the file into the stacked leaf, transposed and cast on the
    way, so that the host never holds more than the model and its largest tensor. Asked to quantize, it rounds
    each projection as it comes; a folder that bitsandbytes has quantized is read as it is.

    Args:
        folder: holds config.json and model.safetensors, or shards with an index; "tiny" is the base
            embedded in jaxft.
        dtype: of the computation, and of the parameters unless `param_dtype` is given.
        param_dtype: of the parameters.
        shardings: (path, shape) -> where that leaf goes; by default the first device.
        quantize: none | nf4 | fp4 | int4 | int8, of all projections.
        group_size: as of `jaxft.quantize`.
        double_quant: as of `jaxft.quantize`.

    Returns:
        (model, params).

    Raises:
        UserError: what `jaxft.quantize` refuses, a folder quantized already that should be quantized
            again, or one that is damaged, incomplete, not a model, or would need code of its own.
    """
    path = model_folder(folder)
    chosen = param_dtype or dtype
    for name in (dtype, chosen):
        if name not in DTYPES:
            raise UserError(
                f"dtype {name!r} is not known{nearest(str(name), DTYPES)}: {', '.join(DTYPES)}"
            )
    check_manifest(path)
    config = dataclasses.replace(model_config(path), dtype=dtype)
    stored = open_folder(path)
    config = _untie_if_different(config, stored, path)
    packed = {name for name in stored if parts_of(stored, name)}
    if quantize != "none" and packed:
        raise UserError(
            f"{path}: is quantized already (bitsandbytes): it is loaded as it is, with quantize none"
        )
    settings: dict[str, Any] = {
        "scheme": quantize,
        "group_size": group_size,
        "double_quant": double_quant,
    }
    plan = _plan(config, stored, path)
    kernels = [name for name in plan if name.endswith("/kernel")]
    rounded = targeted((), kernels, "load") if quantize != "none" else []
    params: dict[str, Any] = {}
    for leaf_path, tensors in plan.items():
        transposed = tensors_of(config)[leaf_path].transposed
        kind = jnp.dtype(chosen)
        leaf: Any
        if tensors[0].name in packed or leaf_path in rounded:
            rows = _sizes(config)[leaf_path]
            if tensors[0].name in packed:
                make = functools.partial(read_weight, stored, shape=rows, dtype=kind)
                weights = (make(name=tensor.name) for tensor in tensors)
            else:
                weights = (round_tensor(t.read(), transposed, kind, **settings) for t in tensors)
            leaf = stacked_on_devices(leaf_path, list(weights), shardings)
        else:
            leaf = _leaf(leaf_path, tensors, transposed, kind, shardings)
        _put(params, leaf_path, leaf)
    if config.tied:
        _put(params, "head/kernel", tied_head(config, chosen))
    return Transformer(config), params


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def names_of(tensor: Tensor, config: Config, path: str) -> list[str]:
    """The names on disk of a leaf: one for each layer, where it is stacked."""
    stacked = path.startswith("layers/")
    return [tensor.name.format(layer=layer) for layer in range(config.layers if stacked else 1)]


def _sizes(config: Config) -> dict[str, tuple[int, ...]]:
    """{path: shape of one layer}."""
    abstract = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    return {
        path: tuple(leaf.shape[1:] if path.startswith("layers/") else leaf.shape)
        for path, leaf in flatten_with_paths(abstract, is_leaf=is_weight)
    }


def _plan(config: Config, stored: Mapping[str, Stored], folder: Path) -> dict[str, list[Stored]]:
    """{path of a leaf: its tensors}, each found and of the right shape, and none left over."""
    shapes = _sizes(config)
    spelled = spelling(config, stored)
    plan: dict[str, list[Stored]] = {}
    used: set[str] = set()
    for path, tensor in tensors_of(config).items():
        names = [spelled(name) for name in names_of(tensor, config, path)]
        on_disk = shapes[path][::-1] if tensor.transposed else shapes[path]
        beside = [parts_of(stored, name) for name in names]
        if any(beside):
            if not all(beside):
                raise UserError(
                    f"{folder}: only some layers of {path} are quantized: jaxft stacks like with like"
                )
            plan[path] = [stored[name] for name in names]
        else:
            plan[path] = [expect(stored, name, on_disk, str(folder)) for name in names]
        used.update(names, *beside)
    ignored = FAMILIES[config.family].ignored + ((HEAD,) if config.tied else ())
    for name in stored:
        if name not in used and not name.endswith(ignored):
            raise UserError(
                f"{stored[name].file}: the tensor {name} is not used by this model"
                f"{nearest(name, used)}"
            )
    return plan


def spelling(config: Config, stored: Mapping[str, Any]) -> Callable[[str], str]:
    """How the folder spells names: those of a model saved without its head have no prefix."""
    prefix = FAMILIES[config.family].prefix
    if any(name.startswith(prefix) for name in stored):
        return lambda name: name
    return lambda name: name.removeprefix(prefix)


def _untie_if_different(config: Config, stored: Mapping[str, Stored], folder: Path) -> Config:
    """The config, its head untied where the file holds a head unlike the embedding."""
    if not config.tied or HEAD not in stored:
        return config
    embedding = spelling(config, stored)(tensors_of(config)["embed/embedding"].name)
    shape = (config.vocabulary, config.hidden)
    head = expect(stored, HEAD, shape, str(folder)).read()
    if np.array_equal(head, expect(stored, embedding, shape, str(folder)).read()):
        return config
    print(
        f"jaxft: {folder}: {HEAD} differs from the embedding, though config.json ties them: "
        "it is read as a head of its own",
        file=sys.stderr,
    )
    return dataclasses.replace(config, tied=False)


def _leaf(
    path: str, tensors: list[Stored], transposed: bool, dtype: Any, shardings: Shardings | None
) -> jax.Array:
    """One leaf on its devices, each of whose shards is filled straight from the file."""
    rows = tensors[0].shape[::-1] if transposed else tensors[0].shape
    shape = (len(tensors), *rows) if path.startswith("layers/") else tuple(rows)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        given = index or ()
        index = (*given, *[slice(None)] * (len(shape) - len(given)))
        layers, inner = (
            (index[0], index[1:]) if path.startswith("layers/") else (slice(None), index)
        )
        chosen = tensors[layers]
        sizes = [len(range(*part.indices(size))) for part, size in zip(inner, rows, strict=True)]
        filled = aligned((len(chosen), *sizes), dtype)
        for place, tensor in zip(filled, chosen, strict=True):
            source = tensor.read()
            copy_blocks((source.T if transposed else source)[inner], place)
        return filled if path.startswith("layers/") else filled[0]

    sharding = shardings(path, shape) if shardings else None
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    reading = by_rows(sharding, shape) if transposed else sharding
    array = jax.make_array_from_callback(shape, reading, shard).block_until_ready()
    if reading == sharding:
        return array
    return jax.jit(lambda x: x, out_shardings=sharding, donate_argnums=0)(array)


def by_rows(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding under which several hosts read a kernel (..., in, out) that is stored as (out, in).

    Whole rows, which follow one another in the file: a part of each row would touch all of its pages on every host.
    The parts are exchanged between the devices afterwards. Where that does not divide, the sharding itself.
    """
    if sharding.is_fully_addressable:
        return sharding
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    axes = tuple(axis for axis in (spec[-1], spec[-2]) if axis is not None)
    if spec[-2] is None or shape[-1] % math.prod(sharding.mesh.shape[axis] for axis in axes):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], None, axes))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend takes over without a copy (64 bytes of alignment)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_blocks(source: np.ndarray, destination: np.ndarray, block: int = 256) -> None:
    """`destination[...] = source`, in blocks that stay in the cache where axes are turned over."""
    if source.ndim < 2 or source.flags.c_contiguous:
        destination[...] = source
        return
    for row in range(0, source.shape[0], block):
        for column in range(0, source.shape[1], block):
            place = np.s_[row : row + block, column : column + block]
            destination[place] = source[place]


def save(
    model: Transformer,
    params: PyTree,
    folder: str | Path,
    *,
    like: str | Path | None = None,
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
        dtype: what to store; by default what the leaves have.
        shard_bytes: the size from which on the model is divided, where `like` says nothing.

    Raises:
        UserError: the tree holds adapters, or the folder is not empty.
    """
    for path, weight in weights_of(params):
        if hasattr(weight, "scheme"):
            check_writable(weight)
        elif not isinstance(weight, Tied):
            kind = type(weight).__name__
            raise UserError(
                f"save: {path} holds an adapter ({kind}): call jaxft.merge(params) first"
            )
    write_model(model.config, params, folder, like=like, dtype=dtype, shard_bytes=shard_bytes)


def write_model(
    config: Config,
    params: PyTree,
    folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`save`, for a tree whose weights are merged one by one while they are written."""
    target = new_folder(folder)
    config = dataclasses.replace(config, tied=_is_tied(params))
    source = open_folder(Path(like)) if like else {}
    tensors = _to_write(config, params, source, dtype)
    counts = {str(tensor.dtype) for tensor in tensors.values()}
    stored_dtype = str(tensors[next(iter(tensors))].dtype) if len(counts) == 1 else "float32"
    raw = dict(read_config(like) if like else config_json(config))
    raw.pop("quantization_config", None)
    quantized = [leaf for _, leaf in weights_of(params) if hasattr(leaf, "scheme")]
    if quantized:
        stored_dtype = str(np.dtype(quantized[0].dtype))
        raw["quantization_config"] = config_of(quantized[0], stored_dtype)
    dtype_key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    write_json(
        target / "config.json", raw | {dtype_key: stored_dtype, "tie_word_embeddings": config.tied}
    )
    write_folder(target, tensors, {name: s.file.name for name, s in source.items()}, shard_bytes)
    if like:
        copy_companions(Path(like), target)
    write_manifest(target)


def _is_tied(params: PyTree) -> bool:
    """Whether the head is still the embedding once all is merged."""
    head = params["head"]["kernel"]
    if not isinstance(head, Tied):
        return False
    bound = head.bind(params)
    return bound.base is params["embed"]["embedding"]


def _to_write(
    config: Config, params: PyTree, source: Mapping[str, Stored], dtype: str | None
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
        for layer, name in enumerate(names_of(tensor, config, path)):
            stacked = path.startswith("layers/")
            if hasattr(leaf, "scheme"):
                one = jax.tree.map(lambda part, layer=layer: part[layer], leaf) if stacked else leaf
                tensors |= written(spelled(name), one)
                continue
            shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
            make = _maker(leaf, layer if stacked else None, tensor.transposed, params, wanted)
            on_disk = shape[::-1] if tensor.transposed else shape
            tensors[spelled(name)] = Lazy(on_disk, wanted, make)
    if config.tied and HEAD in source:
        embedding = tensors_of(config)["embed/embedding"].name
        tensors[HEAD] = tensors[spelled(embedding)]
    return tensors


def _maker(
    leaf: Any, layer: int | None, transposed: bool, params: PyTree, dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        one = leaf if layer is None else jax.tree.map(lambda part: part[layer], leaf)
        dense = one.merged(params) if isinstance(one, Weight) else one
        array = to_host(dense).astype(dtype, copy=False)
        return array.T if transposed else array

    return make


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, the chat template and the generation settings along."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not stays_inside(source, file):
                print(f"jaxft: {file} is a link out of its folder: not copied", file=sys.stderr)
            elif file.is_file():
                shutil.copyfile(file, target / file.name)
