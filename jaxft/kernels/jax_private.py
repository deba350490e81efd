"""What jaxft uses of JAX that JAX does not promise to keep, looked for here alone, with what it must take.

Where it is missing, or takes other arguments, the caller's plain form is used instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

GIVEN = {"q", "k", "v", "segment_ids", "sinks", "logsumexp", "do", "di", "bq", "bkv", "is_mqa", "mask_info"} | {
    "mask_value", "attn_logits_soft_cap", "q_layout", "k_layout", "v_layout", "mask_function", "interpret"
}  # fmt: skip
FOR_KEYS = GIVEN | {"bkv_compute", "use_fused_bwd_kernel"}


class SplashGradients(NamedTuple):
    """The kernels of splash attention's backward pass, which else stand behind one that computes delta once more.

    Attributes:
        for_keys: gives (the queries' gradient or None, the keys', the values').
        for_queries: gives the queries' gradient.
    """

    for_keys: Callable[..., Any]
    for_queries: Callable[..., Any]


@functools.cache
def splash_gradients() -> SplashGradients | None:
    """Both kernels; None where this version of JAX has others."""
    for_keys: Any = getattr(splash_attention_kernel, "_splash_attention_bwd_dkv", None)
    for_queries: Any = getattr(splash_attention_kernel, "_splash_attention_bwd_dq", None)
    if takes_exactly(for_keys, FOR_KEYS) and takes_exactly(for_queries, GIVEN):
        return SplashGradients(for_keys, for_queries)
    return None


def takes_exactly(function: Any, names: set[str]) -> bool:
    """Whether a function can be called by these names, and needs no other.

    >>> takes_exactly(lambda a, b=1: a, {"a"}), takes_exactly(lambda a, b: a, {"a"}), takes_exactly(None, set())
    (True, False, False)
    """
    if not callable(function):
        return False
    parameters = inspect.signature(function).parameters.values()
    needed = {one.name for one in parameters if one.default is inspect.Parameter.empty}
    return needed <= names <= {one.name for one in parameters}
