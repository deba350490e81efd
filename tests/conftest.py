"""What holds in every test: no silent promotion of dtypes or ranks, eight devices on the CPU, programs made quickly.

Warnings are errors too (pyproject.toml). The settings are made before any test asks JAX for a device.
"""

from __future__ import annotations

import collections
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Most of these programs are small and run once or twice: compiling them well takes longer than running them, and
# XLA's emitters of fusions take three quarters of that. Processes that tests start compile as quickly.
QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# On a busy machine eight devices wait for one another for longer than the 40 s after which XLA ends the process.
PATIENTLY = ("--xla_cpu_collective_call_terminate_timeout_seconds=300",)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICKLY, *PATIENTLY]).strip()
# Nothing is asked of the Hugging Face hub, nor of what a developer has of it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(os.path.dirname(__file__), "no-such-folder")
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects that live on
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The scripts that made the golden files need the extra `reference`; they are run by `make golden`.
collect_ignore_glob = ["golden/*.py", "*/golden/*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many slow tests begin first: a worker takes a whole file, and none should begin a long one last."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What has not begun at TESTS_UNTIL, in seconds since 1970, is skipped: .ci/run ends in time, with a result."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("no time was left")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_given_back() -> Iterator[None]:
    """Each holds memory maps, of which a process may have 65,530: a worker of many files ran out of them."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
