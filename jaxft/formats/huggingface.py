"""Hugging Face folders, streamed into a parameter tree. `writing` writes them."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.adaptation import targeted
from jaxft.assets import model_folder
from jaxft.defaults import DOUBLE_QUANT, GROUP_SIZE
from jaxft.errors import UserError, counted, nearest
from jaxft.formats.config_file import model_config, read_config
from jaxft.formats.manifest import check_manifest
from jaxft.formats.multimodal import (
    MODULES,
    may_be_tied,
    prefix_in,
    rest_of,
    spelled_inside,
    tell_rest,
)
from jaxft.formats.naming import with_family
from jaxft.formats.prequantized import Reader, empty_biases, reader_of, refuse_quantized
from jaxft.formats.safetensors import (
    Stored,
    expect,
    open_folder,
)
from jaxft.formats.streamed import (
    aligned,
    dense_kernel,
    round_kernel,
    stacked_on_devices,
)
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, Tensor, tensors_of
from jaxft.models.segments import start_of
from jaxft.models.transformer import Transformer, initial_params, tied_head
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights import Weight, is_weight

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
Rounder = Callable[[str, int, np.ndarray], Weight]
DTYPES = ("float32", "bfloat16", "float16")
HEAD = "lm_head.weight"


def load(
    folder: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    shardings: Shardings | None = None,
    quantize: str = "none",
    group_size: int = GROUP_SIZE,
    double_quant: bool = DOUBLE_QUANT,
    rounder: Rounder | None = None,
) -> tuple[Transformer, PyTree]:
    """Reads a Hugging Face folder: the Flax module and its parameter tree.

    Tensors stream one at a time from the file into the stacked leaf, transposed and cast on the
    way, so that the host never holds more than the model and its largest tensor. Asked to quantize, it rounds
    each projection as it comes; a folder that is quantized already is read as it is: those of bitsandbytes, GPTQ, AWQ
    and compressed-tensors.

    Args:
        folder: holds config.json and model.safetensors, or shards with an index; "tiny" is the base
            embedded in jaxft.
        dtype: of the computation, and of the parameters unless `param_dtype` is given.
        param_dtype: of the parameters.
        shardings: (path, shape) -> where that leaf goes; by default the first device.
        quantize: none | nf4 | fp4 | int4 | int8, of all projections.
        group_size: as of `jaxft.quantize`.
        double_quant: as of `jaxft.quantize`.
        rounder: (path, layer, kernel (in, out)) -> the weight in its place, made by another than `jaxft.quantize`.

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
    raw = read_config(path)
    config = dataclasses.replace(model_config(path), dtype=dtype)
    reader = reader_of(raw, str(path / "config.json"))
    stored = open_folder(path)
    config = _tied_as_stored(config, stored, path, may_be_tied(raw))
    plan, packed = _plan(config, stored, path, reader)
    if quantize != "none" and packed:
        refuse_quantized(reader.name, str(path))
    kernels = [name for name in plan if name.endswith("/kernel")]
    rounded = targeted((), kernels, "load") if quantize != "none" else []
    kind, sizes = jnp.dtype(chosen), sizes_of(config)
    partly = _partly_dense(stored, packed, reader, path)
    plain = functools.partial(
        round_kernel, scheme=quantize, group_size=group_size, double_quant=double_quant
    )
    rounding = rounder or (lambda path, layer, kernel: plain(kernel))
    params: dict[str, Any] = {}
    for leaf_path, tensor in tensors_of(config).items():
        leaf: Any
        if leaf_path in partly:
            kernels_ = kernels_of(stored, packed[leaf_path], reader, sizes[leaf_path], kind, tensor)
            leaf = stacked_on_devices(leaf_path, len(packed[leaf_path]), kernels_, shardings)
        elif leaf_path in packed:
            layers = reader.read_layers(stored, packed[leaf_path], sizes[leaf_path], kind)
            leaf = stacked_on_devices(leaf_path, len(packed[leaf_path]), layers, shardings)
        elif leaf_path in rounded:
            read = functools.partial(_kernel, transposed=tensor.transposed, dtype=kind)
            layers = (
                rounding(leaf_path, layer, read(one)) for layer, one in enumerate(plan[leaf_path])
            )
            leaf = stacked_on_devices(leaf_path, len(plan[leaf_path]), layers, shardings)
        else:
            whole = _shapes_of(config)[leaf_path]
            leaf = _leaf(leaf_path, whole, plan[leaf_path], tensor.transposed, kind, shardings)
        _put(params, leaf_path, leaf)
    if config.tied:
        _put(params, "head/kernel", tied_head(config, chosen))
    return Transformer(config), with_family(params, config, MODULES if prefix_in(stored) else "")


def _partly_dense(
    stored: Mapping[str, Stored], packed: Mapping[str, list[str]], reader: Reader, folder: Path
) -> set[str]:
    """The quantized leaves of which some layers are not: they are held dense, which is said."""
    partly = {
        path
        for path, names in packed.items()
        if not all(reader.parts_of(stored, name) for name in names)
    }
    if partly:
        print(
            f"jaxft: {folder}: some layers of {', '.join(sorted(partly))} are not quantized: all layers of these "
            "are held dequantized, in the dtype of the parameters, because layers are stacked like with like",
            file=sys.stderr,
        )
    return partly


def kernels_of(
    stored: Mapping[str, Stored],
    names: Sequence[str],
    reader: Reader,
    shape: tuple[int, ...],
    dtype: Any,
    tensor: Tensor,
) -> Iterator[np.ndarray]:
    """The dense kernels (in, out) of layers of which some are quantized."""
    for name in names:
        if reader.parts_of(stored, name):
            yield dense_kernel(next(reader.read_layers(stored, [name], shape, dtype)))
        else:
            yield _kernel(stored[name], tensor.transposed, dtype)


def _kernel(tensor: Stored, transposed: bool, dtype: Any) -> np.ndarray:
    """A tensor of the file as a kernel (in, out)."""
    array = tensor.read()
    return np.ascontiguousarray(array.T if transposed else array, dtype)


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def names_of(tensor: Tensor, config: Config, path: str) -> list[str]:
    """The names on disk of a leaf: one for each layer, where it is stacked."""
    return tensor.names(start_of(config, path), _shapes_of(config)[path])


@functools.lru_cache(maxsize=64)
def _shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """{path: shape}."""
    abstract = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    leaves = flatten_with_paths(abstract, is_leaf=is_weight)
    return {path: tuple(leaf.shape) for path, leaf in leaves}


def sizes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """{path: shape of one tensor on disk, as it lies in the tree}: without the axes of layers and experts."""
    shapes, tensors = _shapes_of(config), tensors_of(config)
    lead = {path: tensor.stacked + tensor.each_expert for path, tensor in tensors.items()}
    return {path: shape[lead.get(path, 0) :] for path, shape in shapes.items()}


def _plan(
    config: Config, stored: Mapping[str, Stored], folder: Path, reader: Reader
) -> tuple[dict[str, list[Stored]], dict[str, list[str]]]:
    """({path of a leaf: its tensors}, {path of a quantized leaf: its layers' names}), and no tensor left over."""
    shapes = sizes_of(config)
    spelled = spelling(config, stored)
    _check_layers(config, stored, folder)
    plan: dict[str, list[Stored]] = {}
    packed: dict[str, list[str]] = {}
    used: set[str] = set()
    for path, tensor in tensors_of(config).items():
        names = [spelled(name) for name in names_of(tensor, config, path)]
        on_disk = shapes[path][::-1] if tensor.transposed else shapes[path]
        parts = [reader.parts_of(stored, name) for name in names]
        if any(parts):
            if not path.endswith("/kernel"):
                raise UserError(f"{folder}: {path} is quantized: jaxft reads quantized kernels")
            packed[path] = names
            used.update(*parts)
            dense = [name for name, part in zip(names, parts, strict=True) if not part]
            for name in dense:
                expect(stored, name, on_disk, str(folder))
            used.update(dense)
        else:
            plan[path] = [expect(stored, name, on_disk, str(folder)) for name in names]
            used.update(names)
    used.update(empty_biases(stored, [name for names in packed.values() for name in names]))
    if rest := rest_of(stored):
        tell_rest(str(folder), tuple(rest))
    used.update(unused(config, stored))
    heads = (spelled(HEAD),) if config.tied else ()
    ignored = FAMILIES[config.family].ignored + heads
    for name in stored:
        if name not in used and not name.endswith(ignored):
            raise UserError(
                f"{stored[name].file}: the tensor {name} is not used by this model"
                f"{nearest(name, used)}"
            )
    return plan, packed


def _check_layers(config: Config, stored: Mapping[str, Stored], folder: Path) -> None:
    """UserError where the tensors are of more or fewer layers than config.json says."""
    name = next(tensor.name for tensor in tensors_of(config).values() if tensor.stacked)
    before = spelling(config, stored)(name).partition("{layer}")[0]
    behind = (other.removeprefix(before) for other in stored if other.startswith(before))
    parts = (rest.partition(".")[0] for rest in behind)
    numbers = {int(part) for part in parts if part.isdecimal()}
    if len(numbers) != config.layers and numbers == set(range(len(numbers))) and numbers:
        raise UserError(
            f"{folder}: config.json says {counted(config.layers, 'layer')}, and there are tensors of {len(numbers)}"
        )


def unused(config: Config, stored: Mapping[str, Any]) -> list[str]:
    """The names of a folder's tensors that are not the decoder's, or that it does not use: they are kept."""
    spelled = spelling(config, stored)
    spare = tuple(f"{spelled(module)}." for module in FAMILIES[config.family].spare(config))
    return rest_of(stored) + [name for name in stored if spare and name.startswith(spare)]


def spelling(config: Config, stored: Mapping[str, Any]) -> Callable[[str], str]:
    """How the folder spells names: those of a model saved without its head have no prefix."""
    prefix = FAMILIES[config.family].prefix
    if inside := prefix_in(stored):
        return spelled_inside(inside, stored)
    if any(name.startswith(prefix) for name in stored):
        return lambda name: name
    return lambda name: name.removeprefix(prefix)


def _tied_as_stored(
    config: Config, stored: Mapping[str, Stored], folder: Path, may_be_tied: bool
) -> Config:
    """The config, its head untied where the file holds a head unlike the embedding, tied where it may and has none."""
    name = spelling(config, stored)(HEAD)
    if name not in stored:
        return dataclasses.replace(config, tied=config.tied or may_be_tied)
    if not config.tied:
        return config
    embedding = spelling(config, stored)(tensors_of(config)["embed/embedding"].name)
    shape = (config.vocabulary, config.hidden)
    head = expect(stored, name, shape, str(folder)).read()
    if np.array_equal(head, expect(stored, embedding, shape, str(folder)).read()):
        return config
    print(
        f"jaxft: {folder}: {name} differs from the embedding, though config.json ties them: "
        "it is read as a head of its own",
        file=sys.stderr,
    )
    return dataclasses.replace(config, tied=False)


def _leaf(
    path: str,
    shape: tuple[int, ...],
    tensors: list[Stored],
    transposed: bool,
    dtype: Any,
    shardings: Shardings | None,
) -> jax.Array:
    """One leaf on its devices, each of whose shards is filled straight from the file."""
    rows = tensors[0].shape[::-1] if transposed else tensors[0].shape
    stack = shape[: len(shape) - len(rows)]  # the axes of layers and experts
    numbers = np.arange(len(tensors)).reshape(stack)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        given = index or ()
        index = (*given, *[slice(None)] * (len(shape) - len(given)))
        inner = index[len(stack) :]
        chosen = numbers[index[: len(stack)]]
        sizes = [len(range(*part.indices(size))) for part, size in zip(inner, rows, strict=True)]
        filled = aligned((chosen.size, *sizes), dtype)
        for place, number in zip(filled, chosen.flat, strict=True):
            source = tensors[number].read()
            copy_blocks((source.T if transposed else source)[inner], place)
        return filled.reshape(*chosen.shape, *sizes)

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


def copy_blocks(source: np.ndarray, destination: np.ndarray, block: int = 256) -> None:
    """`destination[...] = source`, in blocks that stay in the cache where axes are turned over."""
    if source.ndim < 2 or source.flags.c_contiguous:
        destination[...] = source
        return
    for row in range(0, source.shape[0], block):
        for column in range(0, source.shape[1], block):
            place = np.s_[row : row + block, column : column + block]
            destination[place] = source[place]
