"""In which dtype a run computes and holds its weights, where the configuration leaves it to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.configuration.keys import assign, conform
from jaxft.configuration.rules import AUTO
from jaxft.methods import Method
from jaxft.runs.folder import config_in
from jaxft.training.setup import method_of

KEYS = ("dtype", "param_dtype")
AMPERE = 8.0  # the first compute capability of NVIDIA's GPUs that multiplies bfloat16 fast


def multiplies_bfloat16_fast(device: Any) -> bool:
    """Whether a device has units for bfloat16: TPUs, and NVIDIA's GPUs from Ampere on.

    A CPU counts as having none: without them bfloat16 is slower there than float32, and JAX does not say which has.

    Args:
        device: of JAX, or what describes one: `platform`, and of a GPU `compute_capability`.
    """
    if device.platform == "gpu":
        return float(getattr(device, "compute_capability", 0.0)) >= AMPERE
    return bool(device.platform == "tpu")


def with_dtypes(config: ConfigDict, device: Any) -> ConfigDict:
    """The configuration with `auto` in `dtype` and `param_dtype` replaced by what suits the device.

    bfloat16 where the device multiplies it fast, float32 elsewhere. What trains of the base itself stays in float32,
    in which small updates are not lost: the whole base under full tuning, or beside `method.train_also`.

    Args:
        config: of a run; it stays as it is.
        device: one of those that compute.
    """
    fast = "bfloat16" if multiplies_bfloat16_fast(device) else "float32"
    weights = "float32" if _trains_base(method_of(config)) else fast
    return _filled(config, {"dtype": fast, "param_dtype": weights})


def with_runs_dtypes(config: ConfigDict, workdir: Path) -> ConfigDict:
    """`with_dtypes` for a run, which keeps those that it began with, on whatever device it goes on.

    Args:
        config: as for `train`.
        workdir: RUN. Nothing is written.
    """
    old = config_in(workdir)
    if old is not None:
        config = _filled(config, {key: old[key] for key in KEYS})
    return with_dtypes(config, jax.devices()[0])


def _trains_base(method: Method) -> bool:
    return method.weight is None or bool(method.train_also)


def _filled(config: ConfigDict, dtypes: dict[str, str]) -> ConfigDict:
    left = {key: dtype for key, dtype in dtypes.items() if config[key] == AUTO}
    if not left:
        return config
    config = conform(config, "configuration")
    for key, dtype in left.items():
        assign(config, key, dtype)
    return config
