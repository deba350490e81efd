"""What holds in every test: no silent promotion of dtypes or ranks, and eight devices on the CPU.

Warnings are errors too (pyproject.toml). The settings are made before any test asks JAX for a device.
"""

from __future__ import annotations

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The scripts that made the golden files need the extra `reference`; they are run by `make golden`.
collect_ignore_glob = ["golden/*.py", "*/golden/*.py"]
