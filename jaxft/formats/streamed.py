"""Quantizing while a model streams in: one tensor at a time, on the host, and then onto the devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.tree import in_layers, map_with_paths
from jaxft.weights import Weight, materialize, quantize
from jaxft.weights.placement import divided_as

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def round_kernel(kernel: np.ndarray, scheme: str, **settings: Any) -> Weight:
    """A kernel (in, out) as a quantized weight whose parts are NumPy arrays.

    It is rounded on the CPU, whose division is exact: so the codes are those of bitsandbytes on any machine.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, quantize(jax.numpy.asarray(kernel), scheme, **settings))


def dense_kernel(weight: Weight) -> np.ndarray:
    """The array that a quantized weight equals, made on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(materialize(jax.tree.map(jax.numpy.asarray, weight)))


def stacked_on_devices(
    path: str, count: int, layers: Iterator[Any], shardings: Shardings | None
) -> Any:
    """The layers' weights, or arrays, stacked as one on its devices; an unstacked leaf has but one.

    Each layer is written into the leaf as it comes, so that the host holds the leaf once and one layer beside it.

    Raises:
        UserError: the layers are quantized in different ways.
    """
    stacked = in_layers(path)
    if shardings is not None:
        layers = (_packed(layer, path, count if stacked else None, shardings) for layer in layers)
    first = next(layers)

    def room(part: Any) -> np.ndarray:
        part = np.asarray(part)
        return aligned((count, *part.shape) if stacked else part.shape, part.dtype)

    whole, kind = jax.tree.map(room, first), _kind(first)
    for number, layer in enumerate(itertools.chain([first], layers)):
        if _kind(layer) != kind:
            raise UserError(
                f"{path}: its layers are quantized in different ways: jaxft stacks like with like"
            )
        index = number if stacked else ...
        for room_, part in zip(jax.tree.leaves(whole), jax.tree.leaves(layer), strict=True):
            room_[index] = part
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def put(part: str, array: np.ndarray) -> jax.Array:
        name = f"{path}/{part}" if part else path
        sharding = shardings(name, array.shape) if shardings else first_device
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index or ...]
        )

    return map_with_paths(put, whole)


def _packed(weight: Any, path: str, count: int | None, shardings: Shardings) -> Any:
    """A layer's weight, its codes in the order in which the stack of `count` layers is divided."""
    layers = () if count is None else (count,)
    return divided_as(weight, lambda part, shape: shardings(f"{path}/{part}", (*layers, *shape)))


def _kind(weight: Weight) -> Any:
    parts = [np.asarray(part) for part in jax.tree.leaves(weight)]
    return jax.tree.structure(weight), [(part.shape, part.dtype) for part in parts]


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend takes over without a copy (64 bytes of alignment)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
