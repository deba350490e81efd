"""The step's program for a mesh, compiled from shapes alone, and the collectives that stand in its text."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxft.adaptation import adapt, partition
from jaxft.configuration import load_config
from jaxft.kernels.compiler_options import compiler_options
from jaxft.mesh import AXES
from jaxft.models.config import Config
from jaxft.models.transformer import initial_params
from jaxft.planning.hlo import ENDS, UNDER_WAY
from jaxft.quantizing import quantize_params
from jaxft.training.optimizer import make_optimizer, schedule
from jaxft.training.program import loss_of
from jaxft.training.setup import method_of
from jaxft.training.sharding import batch_sharding, leaf_sharding, shardings
from jaxft.training.step import initial_state, make_train_step
from jaxft.weights.placement import divided_as

RECIPE = str(Path(__file__).parents[2] / "configs" / "sft.py")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
LLAMA_8B = Config(
    family="llama", vocabulary=128256, hidden=4096, intermediate=14336, layers=32, heads=32,
    key_heads=8, head_dim=128, max_length=131072, rope_theta=500000.0, query_scale=128**-0.5,
    dtype="bfloat16", remat="full",
)  # fmt: skip


def devices_of(topology: str, kind: str) -> list[Any]:
    """The devices of a TPU topology that is not there, as `libtpu` describes them."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": kind,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def mesh_of(devices: list[Any], **sizes: int) -> Mesh:
    """The first devices as a mesh of these sizes."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    array = np.asarray(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_step(
    model: Config, mesh: Mesh, method: str, *, rows: int, length: int, **overrides: Any
) -> Any:
    """The training step on abstract arguments, compiled for the mesh."""
    config = load_config(f"{RECIPE}:{method}", {"steps": 10, "batch_size": rows, **overrides})
    row = method_of(config)
    dtype = jnp.dtype(model.dtype)

    def laid(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            shardings(tree, mesh),
        )

    def tree() -> Any:
        params = initial_params(model, jax.random.key(0), dtype)
        if config.base.quantize != "none":
            params = quantize_params(params, config.base.quantize, group_size=64, double_quant=True)
            params = divided_as(params, functools.partial(leaf_sharding, mesh))
        return adapt(params, row, jax.random.key(1))

    trainable, frozen = partition(jax.eval_shape(tree), row)
    optimizer = make_optimizer(config.optimizer, row, trainable, 10)
    state = jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable)
    step = make_train_step(
        loss_of(config, model, model), optimizer, schedule(config.optimizer, 10), seed=0
    )
    dtypes = {
        "tokens": jnp.int32,
        "segments": jnp.int32,
        "positions": jnp.int32,
        "weights": jnp.float32,
    }
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in dtypes.items()
    }
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None))
        lowered = jitted.lower(laid(state), laid(frozen), batch)
        return lowered.compile(compiler_options=compiler_options(mesh))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: as in KINDS; where: the computation in which it stands; in_loop: whether that is a loop's body or
        called from one; overlapped: whether other work is done meanwhile; shapes: (dtype, dimensions) of what it
        gives; operation: the name in the traced program.
    """

    kind: str
    where: str
    in_loop: bool
    overlapped: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operation: str


def bodies_in(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of a program's text."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = header[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies


def collectives_in(text: str) -> list[Collective]:
    """Every collective of a program's text; a start and its end count once, as do the fusions that it runs beside."""
    bodies = bodies_in(text)
    loops = {
        found for lines in bodies.values() for line in lines
        for found in re.findall(r"body=%?([\w.\-]+)", line)
    }  # fmt: skip
    inside, more = set(loops), set(loops)
    while more:
        called = {
            callee for one in more for line in bodies.get(one, ())
            for callee in re.findall(r"(?:calls|body|to_apply|condition|async_execution_thread)=%?([\w.\-]+)", line)
        }  # fmt: skip
        more = (called & bodies.keys()) - inside
        inside |= more
    beside = set(re.findall(r" call-start\(.*?to_apply=%?([\w.\-]+)", text))  # on another core
    found = []
    for name, lines in bodies.items():
        ends = any(ENDS in line for line in lines)
        for line in lines:
            if UNDER_WAY in line and not ends:
                continue
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match:
                shapes = tuple(
                    (kind, tuple(int(size) for size in sizes.split(",") if size))
                    for kind, sizes in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", match[1])
                )
                operation = re.search(r'op_name="([^"]*)"', line)
                found.append(
                    Collective(
                        match[2],
                        name,
                        name in inside,
                        bool(match[3]) or UNDER_WAY in line or name in beside,
                        shapes,
                        operation[1] if operation else "",
                    )
                )
    return found


def standing_in(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions without those of 1) of every array that a program writes to memory.

    That is all that instructions give, outside of the computations that are fused into one.
    """
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    found, name = set(), ""
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = header[1]
        elif name not in fused and (
            made := re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) [\w\-]+\(", line)
        ):
            for kind, sizes in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", made[1]):
                found.add(
                    (kind, tuple(int(size) for size in sizes.split(",") if size not in ("", "1")))
                )
    return found
