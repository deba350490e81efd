"""Reads a step's numbers, and notices where XLA's CPU runtime will never have them."""

from __future__ import annotations

import time
from typing import Any

import jax

from jaxft.errors import Stalled

LIMIT = 300.0  # seconds of waiting in which this process did nothing
LITTLE = 1.0  # seconds of the processor: less is nothing
LONGEST = 0.01  # seconds between two looks


def fetch(tree: Any) -> Any:
    """`jax.device_get`, which does not wait for ever.

    On a busy machine jaxlib 0.10.2 twice lost a part of a step, of some ten thousand: every thread of its pool then
    slept, and the result never came. A device of another kind, and other processes, may work while this one
    does nothing; a CPU of one's own may not.

    Raises:
        Stalled: no result, and no work either, for `LIMIT` seconds.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        await_ready(arrays)
    return jax.device_get(tree)


def await_ready(arrays: list[Any], limit: float = LIMIT) -> None:
    """Returns when all arrays are there. Only the time that was slept counts, not that of a stopped process.

    Raises:
        Stalled: nothing has happened for `limit` seconds.
    """
    pause, waited, used = 1e-4, 0.0, time.process_time()
    while not all(array.is_ready() for array in arrays):
        time.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, LONGEST)
        if time.process_time() - used > LITTLE:
            waited, used = 0.0, time.process_time()
        if waited > limit:
            raise Stalled(
                f"XLA's CPU runtime has done nothing for {limit:.0f} s, and a result is missing: a fault of jaxlib "
                f"{jax.lib.__version__}, not of the run; the same command goes on from the last checkpoint"
            )
