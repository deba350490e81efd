"""One update: gradients of the trainable tree alone, tokens weighed alike, and no array it must not hold."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jaxft
from jaxft.methods import METHODS, Method
from jaxft.models import Config
from jaxft.models.transformer import initial_params
from jaxft.objectives import sft
from jaxft.training.sharding import batch_sharding, make_mesh, shardings
from jaxft.training.step import initial_state, joined, make_train_step, parts_of
from jaxft.tree import count, flatten_with_paths

CONFIG = Config(
    family="llama",
    vocabulary=64,
    hidden=16,
    intermediate=32,
    layers=2,
    heads=2,
    key_heads=1,
    head_dim=8,
    max_length=64,
    query_scale=8**-0.5,
    tied=True,
)


def batch_of(rows: int, length: int, vocabulary: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens of ragged lengths, about half of them trained."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, length + 1, size=rows)
    inside = np.arange(length)[None, :] < lengths[:, None]
    return {
        "tokens": generator.integers(0, vocabulary, (rows, length)).astype(np.int32) * inside,
        "segments": inside.astype(np.int32),
        "positions": np.where(inside, np.arange(length)[None, :], 0).astype(np.int32),
        "weights": (inside & (generator.random((rows, length)) < 0.5)).astype(np.float32),
    }


def prepared(method: Method, config: Config = CONFIG) -> tuple[Any, Any]:
    """(trainable, frozen) of a random model."""
    params = initial_params(config, jax.random.key(0))
    return jaxft.partition(jaxft.adapt(params, method, jax.random.key(1)), method)


def step_of(config: Config = CONFIG, parts: int = 1) -> tuple[Any, Any]:
    """(step, optimizer)."""
    optimizer = optax.with_extra_args_support(optax.adamw(1e-2))
    loss = lambda params, batch: sft(config, params, batch)  # noqa: E731
    return make_train_step(loss, optimizer, lambda n: 1e-2, seed=0, parts=parts), optimizer


def row(name: str) -> Method:
    """A row of the table at a small rank."""
    return METHODS[name]() if name == "full" else METHODS[name](rank=4)


# What their rows train is seen in tests/weights/test_contract.py, and their steps are LoRA's.
ALIKE = {"rslora", "lora_plus", "lora_fa_v2"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.thorough] if name in ALIKE else []) for name in METHODS],
)
def test_optax_and_gradients_see_the_trainable_tree_alone(name: str) -> None:
    """Gradients have no leaf that is frozen, the optimizer no slot, and a step leaves the frozen tree alone."""
    method = row(name)
    trainable, frozen = prepared(method)
    step, optimizer = step_of()
    batch = batch_of(2, 8)
    state = initial_state(trainable, optimizer)
    slots = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in slots) == 2 * count(trainable)
    grads = jax.eval_shape(
        jax.grad(lambda tuned: sft(CONFIG, jaxft.combine(tuned, frozen), batch)[0]), trainable
    )
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    if name != "full":
        assert count(trainable) < 0.5 * count(frozen)
        assert not any("/base" in path for path, _ in flatten_with_paths(grads))
    before = jax.tree.map(np.asarray, trainable)
    after, metrics = jax.jit(step)(state, frozen, batch)
    assert np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(
        lambda old, new: bool(np.any(old != np.asarray(new))), before, after.trainable
    )
    assert any(jax.tree.leaves(moved))


def test_accumulation_weighs_tokens() -> None:
    """Four parts of two rows of ragged lengths make the update of one batch of eight, to 1e-6."""
    method = jaxft.methods.full()
    trainable, frozen = prepared(method)
    batch = batch_of(8, 16)
    results = []
    for parts in (1, 4):
        step, optimizer = step_of(parts=parts)
        state, metrics = jax.jit(step)(initial_state(trainable, optimizer), frozen, batch)
        results.append((state.trainable, metrics))
    for tree, metrics in results[1:]:
        for name in ("loss", "grad_norm", "tokens"):
            np.testing.assert_allclose(metrics[name], results[0][1][name], rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(results[0][0]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_parts_keep_every_row() -> None:
    """A part takes every `parts`-th row."""
    rows = jnp.arange(6)[:, None]
    parts = parts_of({"x": rows}, 3)["x"]
    np.testing.assert_array_equal(parts[:, :, 0], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(joined(parts), rows)


def test_dropout_depends_on_the_seed_and_the_step_alone() -> None:
    """The same step twice is bit for bit the same; the next differs."""
    method = jaxft.methods.lora(rank=4, dropout=0.5, alpha=64.0)
    trainable, frozen = prepared(method)
    trainable = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1, leaf.dtype), trainable)
    step, optimizer = step_of()
    batch = batch_of(2, 8)
    run = jax.jit(step)
    state = initial_state(trainable, optimizer)
    losses = [float(run(state, frozen, batch)[1]["loss"]) for _ in range(2)]
    later = float(run(state._replace(step=jnp.asarray(1, jnp.int32)), frozen, batch)[1]["loss"])
    assert losses[0] == losses[1] != later


# Shapes at which (tokens, vocabulary), and the gradient of a frozen kernel, would stand out.
WIDE = dataclasses.replace(CONFIG, vocabulary=32768, hidden=64, intermediate=256, head_dim=32)
DEEP = dataclasses.replace(CONFIG, layers=4, hidden=256, intermediate=1024, head_dim=128)


def compiled_step(
    method: Method, config: Config, rows: int, length: int, mesh: Mesh | None = None
) -> Any:
    """The step, compiled from abstract arguments."""

    def abstract() -> Any:
        trainable, frozen = prepared(method, config)
        return initial_state(trainable, step_of(config)[1]), frozen

    state, frozen = jax.eval_shape(abstract)
    step, _ = step_of(config)
    batch = batch_of(rows, length, config.vocabulary)
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()

    def laid(tree: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec),
            tree,
            specs,
        )

    state, frozen = (laid(tree, shardings(tree, mesh)) for tree in (state, frozen))
    batch = laid(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()


def test_no_array_of_tokens_by_vocabulary() -> None:
    """The compiled step, trained head or not, holds no float32 array of all tokens x vocabulary."""
    rows, length, vocabulary = 8, 256, WIDE.vocabulary
    for method in (jaxft.methods.lora(rank=4), jaxft.methods.full()):
        text = compiled_step(method, WIDE, rows, length).as_text()
        sizes = {
            int(np.prod([int(n) for n in shape.split(",")]))
            for shape in re.findall(r"f32\[([\d,]+)\]", text)
        }
        assert max(sizes) < rows * length * vocabulary / 4


def test_no_gradient_of_a_frozen_kernel_in_memory() -> None:
    """LoRA's step needs less temporary memory than full tuning's by more than the frozen kernels' gradients."""
    lora = compiled_step(jaxft.methods.lora(rank=4), DEEP, 1, 32).memory_analysis()
    full = compiled_step(jaxft.methods.full(), DEEP, 1, 32).memory_analysis()
    kernels = 4 * count(jax.eval_shape(lambda: initial_params(DEEP, jax.random.key(0))))
    assert full.temp_size_in_bytes - lora.temp_size_in_bytes > 0.8 * kernels
    assert lora.temp_size_in_bytes < 0.5 * kernels


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gathered_kernels_are_not_kept(remat: str) -> None:
    """With weights in 8 shards, 4 layers more need nothing like 4 layers of whole kernels more."""
    mesh = make_mesh(
        ConfigDict({"data": 1, "fsdp": 8, "context": 1, "tensor": 1}), jax.devices()[:8]
    )

    def temporary(layers: int) -> int:
        config = dataclasses.replace(DEEP, layers=layers, vocabulary=16, remat=remat)
        step = compiled_step(jaxft.methods.lora(rank=4), config, 8, 16, mesh)
        return step.memory_analysis().temp_size_in_bytes

    sizes = jax.eval_shape(lambda: initial_params(DEEP, jax.random.key(0)))
    kernels = 4 * count(sizes["layers"]) / DEEP.layers
    # The loops take a layer's shards of the frozen kernels, an eighth, and of the adapters with their moments.
    assert temporary(8) - temporary(4) < 0.5 * 4 * kernels


def test_the_state_is_donated() -> None:
    """The old trainable tree's buffers become the new one's."""
    analysis = compiled_step(jaxft.methods.full(), DEEP, 1, 32).memory_analysis()
    assert analysis.alias_size_in_bytes > 0.9 * analysis.output_size_in_bytes
