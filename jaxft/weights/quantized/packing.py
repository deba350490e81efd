"""Which rows of a matrix the bytes of a packed one hold: two codes a byte, by halves, in one part or several.

Within a part, a run of rows, row i of its first half lies in a byte's lower bits and row i of its second half in the
upper ones. One part is best where a device has the whole axis: then two products with half of it need nothing moved.
Where devices divide the axis there are as many parts as devices, so that each has in its bytes its own rows' codes.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped, UInt8


def half(which: int, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """The first (0) or second (1) half of an axis.

    >>> half(1, jax.numpy.arange(8), 0)
    Array([4, 5, 6, 7], dtype=int32)
    """
    size = x.shape[axis] // 2  # XLA takes a slice into what reads it, a reshape not always
    return jax.lax.slice_in_dim(x, which * size, (which + 1) * size, axis=axis)


def repacked(codes: UInt8[Any, "*layers half out"], before: int, after: int) -> Any:
    """The bytes of codes packed in so many parts, in another number of them. Arrays may be NumPy's."""
    *layers, rows, out = codes.shape
    apart = codes.reshape(*layers, before, 1, rows // before, out)
    shifts = np.asarray([0, 4], np.uint8).reshape(*[1] * (len(layers) + 1), 2, 1, 1)
    unpacked = (apart >> shifts) & 15
    halves = unpacked.reshape(*layers, after, 2, rows // after, out)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*layers, rows, out)
