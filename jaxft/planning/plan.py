"""Compiles the real training step from shapes alone, and reads off what it needs.

No weight is made or read: `config.model` may be a folder with config.json alone. The step, its optimizer and its
shardings are those of `jaxft train`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import partition
from jaxft.assets import model_folder
from jaxft.configuration.populations import members_of
from jaxft.errors import UserError, counted
from jaxft.formats.config_file import model_config
from jaxft.kernels.compiler_options import compiler_options
from jaxft.methods import row_of
from jaxft.models import Config
from jaxft.objectives import objective_of
from jaxft.objectives.reading import max_length_of
from jaxft.planning.abstract import abstract_params
from jaxft.planning.flops import count_flops
from jaxft.planning.hlo import Program, read_program
from jaxft.planning.kernels import kernel_cycles
from jaxft.planning.rollouts import sampling
from jaxft.planning.topology import Devices, local_flops, local_memory
from jaxft.runs.checkpoint import split_base
from jaxft.training.memory import refused, tpu_temporaries
from jaxft.training.precision import with_dtypes
from jaxft.training.precompute import beforehand, without
from jaxft.training.program import Own, make_program, own_of
from jaxft.training.reference import Reference, make_reference
from jaxft.training.sharding import batch_sharding, laid_out, make_mesh, require_rows, shardings
from jaxft.tree import PyTree, combine
from jaxft.weights import quantized_in
from jaxft.weights.placement import Placement, describe

FEW_STEPS = (
    1000  # of the schedule where a configuration counts epochs: nothing planned depends on it
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs for a configuration's step. Bytes and operations are per device.

    Attributes:
        topology: what was planned for.
        devices: how many of them the mesh takes.
        method, remat, batch_size, length: of the configuration.
        quantize: the schemes in which the base lies, whether the run quantizes it or the folder is so already.
        peak_bytes: the most memory in use at once: the arguments, the results that are not written over them, and
            the temporaries.
        base_bytes: the frozen leaves that are read from the model, and the leaves of a reference.
        adapter_bytes: the trainable leaves and the drawn ones.
        optimizer_bytes: the optimizer's state.
        temporary_bytes: what the step makes and drops: activations, gradients, gathered kernels; of a TPU by
            `tpu_temporaries`.
        activation_bytes: of the temporaries, what the forward pass keeps for the backward pass, by the program's text.
        memory_bytes: what a device has; None if it does not say.
        fits: whether the peak is below that; of a TPU, whether its compiler takes the program.
        flops: of the matrix products, recomputation included.
        exchanged_bytes: results of the collectives.
        seconds_per_step: an estimate: of a TPU the greater of the exchange over the links and of the compiler's cycles
            with what is exchanged while nothing else runs, attention's kernel counted by its schedule; of this
            machine, the products at the speed measured for one.
        tokens_per_second: of all devices.
        mfu: the products without recomputation over what the device could do in that time; None locally.
        rollout_bytes: the most memory in use at once while completions are sampled, the parameters counted; 0 where
            nothing is sampled. It has to fit as well, and the optimizer's state stands beside it.
        cache_bytes: of that, keys and values: of each prompt once, and of the completions continued at a time.
        score_bytes: as rollout_bytes, while training's program reads what was sampled.
        reference_bytes: as rollout_bytes, while the reference reads it; 0 where it is not asked.
        hours: of all updates; None where the configuration counts epochs of data that were not read.
        compile_seconds: how long the compiler took.
    """

    topology: str
    devices: int
    method: str
    quantize: str
    remat: str
    batch_size: int
    length: int
    peak_bytes: int
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    activation_bytes: int
    memory_bytes: int | None
    fits: bool
    flops: int
    exchanged_bytes: int
    seconds_per_step: float | None
    tokens_per_second: float | None
    mfu: float | None
    hours: float | None
    compile_seconds: float
    rollout_bytes: int = 0
    cache_bytes: int = 0
    score_bytes: int = 0
    reference_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Traced:
    """An update as the compiler gets it, its loss (trainable, frozen, batch, *held), and their arguments as shapes.

    `held` is `reference.held`.
    """

    update: Callable[..., Any]
    loss: Callable[..., Any]
    state: Any
    frozen: PyTree
    batch: dict[str, Any]
    own: Own
    reference: Reference
    drawn: PyTree
    base: PyTree
    schemes: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of `update`."""
        return self.state, self.frozen, self.batch, self.own, *self.reference.held


def plan(config: ConfigDict, target: Devices) -> Plan:
    """Compiles the configuration's step for the devices and tells what it needs.

    Args:
        config: as `configs/sft.py:get_config` makes it; the data are not read.
        target: from `tpu_devices` or `local_devices`.

    Raises:
        UserError: the configuration does not fit the model or the mesh, or is of several runs.
    """
    if members := members_of(config):
        raise UserError(
            f"plan tells of one run, and config.population has {counted(len(members), 'member')}: leave it out; of"
            " what is told each member has its own adapter, optimizer and temporaries, and all share the base"
        )
    config, mesh, model = _settled(config, target)
    with jax.set_mesh(mesh):
        traced = _trace(config, model, mesh)
        parts = _parts(traced)
        placed = jax.tree.map(lambda leaf: leaf.sharding, traced.state)
        jitted = jax.jit(traced.update, donate_argnums=0, out_shardings=(placed, None))
        lowered = jitted.lower(*traced.arguments)
        start = time.perf_counter()
        peak, temporary, memory, program = _compiled(
            lowered, sum(parts.values()), target, compiler_options(mesh)
        )
        sampled = _sampling(config, model, traced, mesh, target)
        seconds = time.perf_counter() - start
        flops = _flops(traced, mesh)
        least = (
            flops if config.remat == "none" else _flops(_trace(config, _plain(model), mesh), mesh)
        )
        kept = _activation_bytes(traced, mesh)
    length = traced.batch["tokens"].shape[1]
    duration = _seconds(target, program, flops, config.dtype)
    return Plan(
        topology=target.name,
        devices=mesh.size,
        method=config.method.name,
        quantize=traced.schemes,
        remat=config.remat,
        batch_size=config.batch_size,
        length=length,
        peak_bytes=peak,
        **parts,
        temporary_bytes=temporary,
        activation_bytes=min(kept, temporary),
        memory_bytes=memory,
        fits=(program is not None or memory is None or peak <= memory)
        and (memory is None or _most(sampled) + parts["optimizer_bytes"] <= memory),
        flops=flops,
        exchanged_bytes=sum(program.exchanged.values()) if program else 0,
        seconds_per_step=duration,
        tokens_per_second=config.batch_size * length / duration if duration else None,
        mfu=least / (duration * target.chip.flops) if duration and target.chip else None,
        hours=config.steps * duration / 3600 if duration and config.steps else None,
        compile_seconds=round(seconds, 1),
        **sampled,
    )


def _sampling(
    config: ConfigDict, model: Config, traced: _Traced, mesh: Mesh, target: Devices
) -> dict[str, int]:
    """What `Plan` says of sampling; nothing where nothing is sampled."""
    params = combine(traced.state.trainable, traced.frozen)
    what = (traced.frozen, traced.batch, traced.reference)
    found = sampling(config, model, params, *what, mesh)
    if found is None:
        return {}
    held, trainable = _bytes(traced.reference.held), _bytes(traced.state.trainable)
    programs = {  # with the bytes that stand beside it and are no arguments of it
        "rollout": (found.sampler, held),
        "score": (found.scorer, held),
        "reference": (found.reference, trainable),
    }
    sizes = {"cache_bytes": found.cache_bytes}
    for name, (lowered, beside) in programs.items():
        if lowered is not None:  # a run compiles them without options
            peak, *_ = _memory(lowered, _bytes(params), target, {})
            sizes[f"{name}_bytes"] = peak + beside
    return sizes


def _most(sampled: dict[str, int]) -> int:
    return max((size for name, size in sampled.items() if name != "cache_bytes"), default=0)


def variants(
    for_method: Callable[[str], ConfigDict],
    methods: Iterable[str],
    schemes: Iterable[str],
    remats: Iterable[str],
) -> Iterator[ConfigDict]:
    """The configuration for each method, over each base, under each recomputation.

    A method that trains the base has no quantized one.

    Args:
        for_method: gives the configuration for a method, as `Recipe.for_method`.
        methods: names of rows of the table.
        schemes: what the base is quantized to.
        remats: what the backward pass recomputes.
    """
    for method, scheme, remat in itertools.product(methods, schemes, remats):
        if scheme == "none" or row_of(method)().weight is not None:
            changed = for_method(method).copy_and_resolve_references()
            with changed.unlocked():
                changed.remat = remat
                changed.base.quantize = scheme
            yield changed


def kept_bytes(config: ConfigDict, target: Devices) -> int:
    """Bytes of the step's arguments and of what is kept for the backward pass, on a device: known without compiling.

    The peak is above it, by gathered kernels and what is dropped at once.
    """
    config, mesh, model = _settled(config, target)
    with jax.set_mesh(mesh):
        traced = _trace(config, model, mesh)
        return sum(_parts(traced).values()) + _activation_bytes(traced, mesh)


def placements(config: ConfigDict, target: Devices) -> list[Placement]:
    """How every leaf of the adapted tree lies on the mesh, the costliest copies first."""
    config, mesh, model = _settled(config, target)
    with jax.set_mesh(mesh):
        traced = _trace(config, model, mesh)
    return describe(combine(traced.state.trainable, traced.frozen), mesh)


def find_batch(config: ConfigDict, target: Devices) -> tuple[Plan | None, list[Plan]]:
    """The largest `batch_size` that fits, by doubling and bisection; and all plans that were made.

    Sizes are multiples of what the mesh and `grad_accum` divide.
    """
    mesh = _mesh_of(config, target)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accum
    made: dict[int, Plan] = {}

    def fits(units: int) -> bool:
        if units not in made:
            changed = config.copy_and_resolve_references()
            changed.batch_size = units * unit
            made[units] = plan(changed, target)
        return made[units].fits

    low, high = 0, 1
    while fits(high) and high < 2**16:
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return made.get(low), list(made.values())


def _model_of(config: ConfigDict) -> Config:
    """The decoder's shape, and how the run computes it."""
    shape = model_config(model_folder(config.model, weights=False))
    return dataclasses.replace(shape, dtype=config.dtype, remat=config.remat)


def _settled(config: ConfigDict, target: Devices) -> tuple[ConfigDict, Mesh, Config]:
    """(the configuration with dtypes for these devices, its mesh over as many as it takes, the model)."""
    config = with_dtypes(config, target.devices[0])
    return config, _mesh_of(config, target), _model_of(config)


def _mesh_of(config: ConfigDict, target: Devices) -> Mesh:
    """The configuration's mesh over as many of the devices as it takes: sizes of 1 take one."""
    sizes, devices = config.mesh.values(), list(target.devices)
    return make_mesh(config.mesh, devices if -1 in sizes else devices[: math.prod(sizes)])


def _trace(config: ConfigDict, model: Config, mesh: Mesh) -> _Traced:
    """The step of `jaxft train`, from shapes."""
    require_rows(config.batch_size // config.grad_accum, mesh, "batch_size")
    method, params = abstract_params(config, model, mesh)
    trainable, frozen = partition(params, method)
    reference = make_reference(config, model, trainable, mesh)
    if beforehand(config):
        reference = without(reference)
    steps = config.steps or FEW_STEPS
    program = make_program(config, model, method, trainable, reference, steps)
    state = jax.eval_shape(program.initial, trainable)
    drawn, rest = split_base(params, frozen)
    shapes, rows = objective_of(config).examples.shapes, batch_sharding(mesh)
    batch = shapes(config, max_length_of(config, model))
    return _Traced(
        update=program.update,
        loss=program.eval_sums,
        state=_laid(state, mesh),
        frozen=_laid(frozen, mesh),
        batch=laid_out(batch, dict.fromkeys(batch, rows)),
        own=jax.eval_shape(functools.partial(own_of, config, steps)),
        reference=reference,
        drawn=_laid(drawn, mesh),
        base=_laid(rest, mesh),
        schemes="+".join(sorted({weight.scheme for _, weight in quantized_in(frozen)})) or "none",
    )


def _laid(tree: PyTree, mesh: Mesh) -> PyTree:
    return laid_out(tree, shardings(tree, mesh))


def _plain(model: Config) -> Config:
    return dataclasses.replace(model, remat="none")


def _parts(traced: _Traced) -> dict[str, int]:
    """Bytes per device of the step's arguments but the batch."""
    return {
        "base_bytes": _bytes(traced.base) + _bytes(traced.reference.held),
        "adapter_bytes": _bytes(traced.state.trainable) + _bytes(traced.drawn),
        "optimizer_bytes": _bytes(traced.state.optimizer),
    }


def _bytes(tree: PyTree) -> int:
    """Bytes of one device's shards; what lies in the host's memory has none there."""
    return sum(
        math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _width(leaf.dtype))
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != "pinned_host"
    )


def _width(dtype: Any) -> float:
    """Bytes of an element; two of int4 share one."""
    return 0.5 if dtype in (jnp.int4, jnp.uint4) else dtype.itemsize


def _compiled(
    lowered: Any, arguments: int, target: Devices, options: dict[str, str]
) -> tuple[int, int, int | None, Program | None]:
    """(peak, temporary, memory, program); a step that the TPU compiler refuses tells the first three."""
    peak, temporary, memory, compiled = _memory(lowered, arguments, target, options)
    if target.chip is None or compiled is None or memory is None:
        return peak, temporary, memory, None
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jax {jax.__version__} cannot read what libtpu {version('libtpu')} made of the step: pip install"
            " 'jaxft[tpu]' takes the libtpu that belongs to jax"
        ) from error
    kernel = functools.partial(kernel_cycles, target.name.partition(":")[0])
    program = read_program(text, kernel, target.chip.flops / target.chip.clock)
    return min(peak, memory), temporary, memory, program


def _memory(
    lowered: Any, arguments: int, target: Devices, options: dict[str, str]
) -> tuple[int, int, int | None, Any]:
    """(peak, temporary, memory, compiled) of a program; the last is None where the TPU compiler refuses it."""
    memory = int(target.chip.memory) if target.chip else local_memory()
    try:
        compiled = lowered.compile(compiler_options=options)
    except Exception as error:
        size, room = refused(error)
        # What it calls temporaries are the arguments too, but no gaps between buffers.
        return size, max(size - arguments, 0), room, None
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes if target.chip is None else tpu_temporaries(analysis)
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return held - analysis.alias_size_in_bytes + temporary, temporary, memory, compiled


def _flops(traced: _Traced, mesh: Mesh) -> int:
    """Of one device: those of the whole step, evenly divided."""
    return count_flops(jax.make_jaxpr(traced.update)(*traced.arguments)) // mesh.size


def _activation_bytes(traced: _Traced, mesh: Mesh) -> int:
    """What the forward pass hands to the backward pass and was not there before: every axis of the mesh divides it."""

    def kept(trainable: PyTree, *others: Any) -> Any:
        return jax.vjp(lambda tree: traced.loss(tree, *others)[0], trainable)[1]

    others = (traced.frozen, traced.batch, *traced.reference.held)
    jaxpr = jax.make_jaxpr(kept)(traced.state.trainable, *others).jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    made: dict[int, Any] = {
        id(v): v.aval for v in jaxpr.outvars if id(v) not in given and isinstance(v, Var)
    }
    total = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in made.values())
    return int(total) // mesh.size


def _seconds(target: Devices, program: Program | None, flops: int, dtype: str) -> float | None:
    """The estimate for one step; None for a program that did not compile."""
    if target.chip is None:
        return flops / local_flops(dtype)
    if program is None:
        return None
    links = max(sum(size > 1 for size in target.axes), 1)
    speed = target.chip.link * links
    works = program.cycles / target.chip.clock + program.exposed / speed
    return max(works, sum(program.exchanged.values()) / speed)
