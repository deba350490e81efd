"""What holds in every test: no silent promotion of dtypes or ranks, eight devices on the CPU, programs made quickly.

Warnings are errors too (pyproject.toml). The settings are made before any test asks JAX for a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest

# Most of these programs run once and are small: compiling them takes longer. Processes that tests start do so too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The scripts that made the golden files need the extra `reference`; they are run by `make golden`.
collect_ignore_glob = ["golden/*.py", "*/golden/*.py"]


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_given_back() -> Iterator[None]:
    """Each holds memory maps, of which a process may have 65,530: a worker of many files ran out of them."""
    yield
    jax.clear_caches()
