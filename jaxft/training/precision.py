"""In which dtype a run computes and holds its weights, where the configuration leaves it to the device."""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict

from jaxft.methods import Method

AUTO = "auto"
AMPERE = 8.0  # the first compute capability of NVIDIA's GPUs that multiplies bfloat16 fast


def multiplies_bfloat16_fast(device: Any) -> bool:
    """Whether a device has units for bfloat16: TPUs, and NVIDIA's GPUs from Ampere on.

    A CPU counts as having none: without them bfloat16 is slower there than float32, and JAX does not say which has.

    Args:
        device: of JAX, or what describes one: `platform`, and of a GPU `compute_capability`.
    """
    if device.platform == "gpu":
        return float(getattr(device, "compute_capability", 0.0)) >= AMPERE
    return device.platform == "tpu"


def with_dtypes(config: ConfigDict, method: Method, device: Any) -> ConfigDict:
    """The configuration with `auto` in `dtype` and `param_dtype` replaced by what suits the device.

    bfloat16 where the device multiplies it fast, float32 elsewhere. What trains of the base itself stays in float32,
    in which small updates are not lost: the whole base under full tuning, or beside `method.train_also`.

    Args:
        config: of a run; it stays as it is.
        method: what trains.
        device: one of those that compute.
    """
    fast = "bfloat16" if multiplies_bfloat16_fast(device) else "float32"
    trains_base = method.weight is None or bool(method.train_also)
    found = {"dtype": fast, "param_dtype": "float32" if trains_base else fast}
    settled = copy.deepcopy(config)
    for key, dtype in found.items():
        if settled[key] == AUTO:
            settled[key] = dtype
    return settled
