"""However the same examples are laid out, the update is the same: in parts, packed, over devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import jaxft
from jaxft.data import Batches, Example
from jaxft.models import Config
from jaxft.models.transformer import initial_params
from jaxft.objectives import sft
from jaxft.training.sharding import make_mesh, place_batch, shardings
from jaxft.training.step import initial_state, make_train_step
from jaxft.tree import flatten_with_paths

CONFIG = Config(
    family="llama",
    vocabulary=64,
    hidden=16,
    intermediate=32,
    layers=2,
    heads=2,
    key_heads=1,
    head_dim=8,
    max_length=32,
    query_scale=8**-0.5,
    tied=True,
)
ROWS = 64  # 8 devices of 8 parts
TOLERANCE = 1e-5


def examples() -> list[Example]:
    """64 sequences of 2 to 16 random tokens, of which the last half or so is trained."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 17, ROWS)
    return [
        Example(
            generator.integers(0, 64, n).astype(np.int32),
            np.arange(n) >= generator.integers(1, n),
            f"t:{i}",
        )
        for i, n in enumerate(lengths)
    ]


def batch_of(packing: bool) -> dict[str, np.ndarray]:
    """All examples in one batch: a row each, or many in the first rows and the others empty."""
    batches = Batches(
        examples(),
        batch_size=ROWS,
        max_length=32,
        packing=packing,
        shuffle=False,
        seed=0,
        pad_id=0,
        epochs=1,
        buckets=(16, 32),
    )
    assert len(batches) == 1
    return batches[0]


def keep_gradients() -> optax.GradientTransformationExtraArgs:
    """An optimizer whose state is the gradient that it was given last, and which changes nothing."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    keep = optax.GradientTransformation(zeros, lambda grads, *_: (zeros(grads), grads))
    return optax.with_extra_args_support(keep)


@functools.cache
def prepared(name: str) -> tuple[Any, Any]:
    """(trainable, frozen) of a random model, the adapter moved off its start."""
    method = jaxft.methods.full() if name == "full" else jaxft.methods.lora(rank=4)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)

    params = jax.jit(lambda key: initial_params(CONFIG, key))(jax.random.key(0))
    trainable, frozen = jaxft.partition(jaxft.adapt(params, method, jax.random.key(1)), method)
    return jax.tree.map(moved, trainable) if method.weight else trainable, frozen


def update(
    name: str, *, parts: int = 1, packing: bool = False, devices: int = 1
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, gradients by path) of one update."""
    trainable, frozen = prepared(name)
    mesh = make_mesh(
        ConfigDict({"data": devices, "fsdp": 1, "context": 1, "tensor": 1}), jax.devices()[:devices]
    )
    step = make_train_step(
        functools.partial(sft, CONFIG), keep_gradients(), lambda n: 0.0, seed=0, parts=parts
    )
    with jax.set_mesh(mesh):
        state = initial_state(trainable, keep_gradients())
        state, frozen = (jax.device_put(tree, shardings(tree, mesh)) for tree in (state, frozen))
        state, metrics = jax.jit(step)(state, frozen, place_batch(batch_of(packing), ROWS, mesh))
    gradients = {path: np.asarray(leaf) for path, leaf in flatten_with_paths(state.optimizer)}
    return {name: float(value) for name, value in metrics.items()}, gradients


@functools.cache
def plain(name: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One part, a row an example, one device."""
    return update(name)


def test_the_layouts_are_different() -> None:
    """Else the laws below would say nothing."""
    apart, packed = batch_of(False), batch_of(True)
    assert apart["tokens"].shape == (ROWS, 16)
    assert packed["tokens"].shape == (ROWS, 32)
    assert (packed["segments"].max(1) > 1).sum() > 10
    assert (packed["segments"].max(1) == 0).sum() > 10
    assert apart["weights"].sum() == packed["weights"].sum()


@pytest.mark.parametrize(
    ("parts", "packing", "devices"),
    [
        *((1, True, 1), (2, False, 1), (8, True, 1), (4, False, 8), (8, True, 8)),
        *(
            pytest.param(*layout, marks=pytest.mark.thorough)
            for layout in (
                (2, True, 1),
                (4, False, 1),
                (4, True, 1),
                (8, False, 1),
                (1, False, 8),
                (2, True, 8),
            )
        ),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_layout(
    parts: int, packing: bool, devices: int
) -> None:
    """Full tuning, so that every weight's gradient counts; to 1e-5 of its norm."""
    check("full", parts=parts, packing=packing, devices=devices)


@pytest.mark.parametrize("layout", [{"parts": 4}, {"packing": True, "parts": 2, "devices": 8}])
def test_also_through_an_adapter(layout: dict[str, Any]) -> None:
    """The gradients of a and b."""
    check("lora", **layout)


def check(name: str, **layout: Any) -> None:
    """The law: loss, gradient norm and every gradient within 1e-5, the trained tokens equal."""
    metrics, gradients = update(name, **layout)
    expected, plain_gradients = plain(name)
    assert metrics["tokens"] == expected["tokens"]
    for number in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[number], expected[number], rtol=TOLERANCE)
    assert gradients.keys() == plain_gradients.keys()
    for path, gradient in gradients.items():
        norm = np.linalg.norm(plain_gradients[path])
        assert norm > 0, path
        assert np.linalg.norm(gradient - plain_gradients[path]) <= TOLERANCE * norm, path
