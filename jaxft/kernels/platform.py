"""The one file that chooses a form of a computation by the platform that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def by_platform(*arrays: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`forms["tpu"](*arrays)` in a program for TPUs, and so on; `default(*arrays)` on a platform without its own form.

    All give the same shapes and dtypes.

    The choice is made when the program is lowered, so that a program for TPUs can be made on any machine.

    >>> import jax.numpy as jnp
    >>> by_platform(jnp.float32(2), tpu=lambda x: x + x, default=lambda x: 2 * x).item()
    4.0
    """
    return jax.lax.platform_dependent(*arrays, default=default, **forms)
