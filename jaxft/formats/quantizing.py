"""Quantizing while a model streams in: one tensor at a time, on the host, and then onto the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.tree import map_with_paths
from jaxft.weights import Weight, quantize

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def round_tensor(
    array: np.ndarray, transposed: bool, dtype: Any, scheme: str, **settings: Any
) -> Weight:
    """A tensor of the file as a quantized weight whose parts are NumPy arrays.

    It is rounded on the CPU, whose division is exact: so the codes are those of bitsandbytes on any machine.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        kernel = jax.numpy.asarray(np.ascontiguousarray(array.T if transposed else array, dtype))
        return jax.tree.map(np.asarray, quantize(kernel, scheme, **settings))


def stacked_on_devices(path: str, layers: Sequence[Weight], shardings: Shardings | None) -> Weight:
    """The layers' weights stacked as one on its devices; an unstacked leaf has but one."""
    if len({jax.tree.structure(layer) for layer in layers}) > 1:
        raise UserError(
            f"{path}: its layers are quantized in different ways: jaxft stacks like with like"
        )
    stacked = path.startswith("layers/")
    whole = jax.tree.map(lambda *parts: np.stack(parts) if stacked else parts[0], *layers)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def put(part: str, array: np.ndarray) -> jax.Array:
        sharding = shardings(f"{path}/{part}", array.shape) if shardings else first
        # a copy of what it gets: the parts may be views of the file
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index or ...]
        )

    return map_with_paths(put, whole)
