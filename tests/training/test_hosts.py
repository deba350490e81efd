"""Several processes, each with devices and rows of its own, train on the same global batches."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft.data import Batches, Example
from jaxft.training.sharding import host_rows, make_mesh, place_batch

HOST = """
import sys, jax, numpy as np
from ml_collections import ConfigDict
host, hosts, port, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // hosts)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", hosts, host)
from jax.sharding import NamedSharding, PartitionSpec
from tests_hosts import batches_of, steps
from jaxft.training.sharding import host_rows, make_mesh, place_batch
mesh = make_mesh(ConfigDict({"data": 2, "fsdp": 2, "context": 1, "tensor": 1}))
rows = host_rows(8, mesh)
assert rows == (8 // hosts * host, 8 // hosts * (host + 1)), rows
whole = jax.jit(lambda batch: batch, out_shardings=NamedSharding(mesh, PartitionSpec()))
batches, found = batches_of(rows), {}
for step in range(steps):
    local = next(batches)
    assert local["tokens"].shape[0] == 8 // hosts
    for name, array in whole(place_batch(local, 8, mesh)).items():
        found[f"{step} {name}"] = np.asarray(array.addressable_data(0))
np.savez(target, **found)
"""
SHARED = """
import numpy as np
from jaxft.data import Batches, Example

steps = 7  # more than an epoch

def batches_of(host_rows):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 31, 40)
    examples = [
        Example(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) > 0, f"t:{i}")
        for i, n in enumerate(lengths)
    ]
    return Batches(
        examples, batch_size=8, max_length=32, packing=False, shuffle=True, seed=5, pad_id=0,
        buckets=(8, 16, 24, 32), host_rows=host_rows,
    )
"""


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize(
    "hosts",
    [pytest.param(1, marks=pytest.mark.thorough), 2, pytest.param(4, marks=pytest.mark.thorough)],
)
def test_hosts_see_the_global_batches_of_one(hosts: int, tmp_path: Path) -> None:
    """1, 2 and 4 processes over the same four devices, by gloo: every process holds its rows, and no other."""
    (tmp_path / "tests_hosts.py").write_text(SHARED)
    port = str(free_port())
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                HOST,
                str(host),
                str(hosts),
                port,
                str(tmp_path / f"{host}.npz"),
            ],
            env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": "", "HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    scope: dict = {}
    exec(SHARED, scope)
    expected = scope["batches_of"](None)
    for step in range(scope["steps"]):
        batch = next(expected)
        for host in range(hosts):
            found = np.load(tmp_path / f"{host}.npz")
            for name, array in batch.items():
                np.testing.assert_array_equal(found[f"{step} {name}"], array)


def test_rows_of_a_batch_stand_on_the_devices_in_order() -> None:
    """Of one process all rows are its own; tensor-parallel devices hold the same ones."""
    from ml_collections import ConfigDict

    mesh = make_mesh(
        ConfigDict({"data": 2, "fsdp": 2, "context": 1, "tensor": 2}), jax.devices()[:8]
    )
    assert host_rows(8, mesh) == (0, 8)
    example = Example(np.arange(5, dtype=np.int32), np.arange(5) > 0, "t:1")
    batches = Batches(
        [example] * 8, batch_size=8, max_length=8, packing=False, shuffle=False, seed=0, pad_id=0
    )
    batch = next(batches)
    placed = place_batch(batch, 8, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(2, 8)}
