"""The laws that every kind of weight keeps on every kernel, and every row of the table. A new row adds no test here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft.methods import METHODS, defaults
from jaxft.tree import flatten_with_paths, partition
from jaxft.weights import contract_each, is_adapter


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """A thousand small programs, each run once or twice: compiling them well takes longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(left, right, tolerance=1e-5):
    """To a share of the largest entry: products cancel."""
    assert left.dtype == right.dtype
    largest = max(1.0, float(jnp.max(jnp.abs(right))))
    np.testing.assert_allclose(left, right, rtol=0.0, atol=tolerance * largest)


def loss(case, trainable, frozen):
    params = jaxft.combine(trainable, frozen)
    return jnp.mean(jnp.square(case.base.apply(params, case.base.x) - 1.0))


def test_a_fresh_adapter_changes_nothing(case):
    before = case.base.apply(case.base.params, case.base.x)
    assert_close(case.base.apply(case.params, case.base.x), before, tolerance=1e-6)


def test_the_base_is_taken_over_and_not_copied(case):
    arrays = {id(leaf) for leaf in jax.tree.leaves(case.params)}
    assert all(id(leaf) in arrays for leaf in jax.tree.leaves(case.base.params))


def test_contract_equals_the_product_with_what_it_materializes(case):
    for weight in case.randomised().layers():
        dense = jaxft.materialize(weight)
        assert dense.shape == weight.shape
        assert dense.dtype == weight.dtype
        x = normal(7, 2, 3, dense.shape[0])
        assert_close(jaxft.contract(x, weight), x @ dense)
        y = normal(8, 2, 3, dense.shape[1])
        assert_close(jaxft.contract_transposed(y, weight), y @ dense.T)
        if case.base.path != "head/kernel":
            ids = jnp.asarray([[0, 2], [1, dense.shape[0] - 1]], jnp.int32)
            assert_close(jaxft.take(weight, ids), dense[ids])


def test_weights_that_read_one_input_are_contracted_together_as_each_alone(case):
    """With the same adapter twice, and a plain matrix; gradients to the input and to the adapters."""

    def apart(x, weights):
        return [jaxft.contract(x, one) for one in weights]

    def loss(way, x, trainable):
        adapted = jaxft.combine(trainable, frozen)
        each = way(x, [adapted, jaxft.materialize(weight), adapted])
        return sum(jnp.mean(jnp.sin(factor * y)) for factor, y in enumerate(each, 1)), each

    for weight in case.randomised().layers():
        x = normal(7, 2, 3, weight.shape[0])
        trainable, frozen = partition(weight, [("a", True), ("b", True)])
        found = [
            jax.value_and_grad(loss, (1, 2), has_aux=True)(way, x, trainable)
            for way in (contract_each, apart)
        ]
        for left, right in zip(*map(jax.tree.leaves, found), strict=True):
            assert_close(left, right)


def test_an_adapter_reads_the_input_by_another_name(case):
    """Its share of the gradient goes there: both shares together are the whole."""

    def total(x, read):
        bound = weight.reading(read) if is_adapter(weight) else weight
        return jnp.sum(jnp.sin(jaxft.contract(x, bound)))

    moved = []
    for weight in case.randomised().layers():
        x = normal(7, 2, 3, weight.shape[0])
        value, shares = jax.value_and_grad(total, (0, 1))(x, x)
        whole, gradient = jax.value_and_grad(lambda x: total(x, x))(x)
        assert_close(value, whole)
        assert_close(sum(shares), gradient)
        moved.append(bool(jnp.any(shares[1] != 0)))
    assert any(moved) == is_adapter(case.weight)  # a layer may be left out


def test_a_stack_materializes_layer_by_layer(case):
    moved = case.randomised()
    whole = jaxft.materialize(moved.weight)
    layers = [jaxft.materialize(weight) for weight in moved.layers()]
    assert_close(whole, jnp.stack(layers) if len(layers) > 1 else layers[0])


def test_merging_changes_no_output_and_leaves_no_adapter(case):
    moved = case.randomised()
    merged = jaxft.merge(moved.params)
    assert_close(case.base.apply(merged, case.base.x), case.base.apply(moved.params, case.base.x))
    paths = [path for path, _ in flatten_with_paths(merged)]
    assert case.method.name == "full" or case.base.path in paths
    assert all(path in (case.base.path, "embed/embedding") for path in paths)


def test_gradient_and_optimizer_hold_no_frozen_leaf(row):
    trainable, frozen = jaxft.partition(row.params, row.method)
    if row.method.weight is not None:
        expected = {f"{row.base.path}/{part}" for part in row.method.trainable}
        assert {path for path, _ in flatten_with_paths(trainable)} == expected
    gradient = jax.eval_shape(jax.grad(lambda tree: loss(row, tree, frozen)), trainable)
    slots = jax.eval_shape(optax.adamw(1e-3).init, trainable)[0].mu
    for tree in (gradient, slots):
        assert jax.tree.structure(tree) == jax.tree.structure(trainable)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(row.params)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_output_has_the_dtype_of_the_input(case, dtype):
    x = case.base.x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cast = case.base.cast(dtype)
        params = jaxft.adapt(cast, case.method, jax.random.key(5))
        assert jax.eval_shape(case.base.apply, params, x).dtype == dtype
        return
    assert jax.eval_shape(case.base.apply, case.params, x.astype(dtype)).dtype == dtype


def test_a_merged_weight_has_the_dtype_of_its_base(case):
    cast = case.base.cast(jnp.bfloat16)
    params = jaxft.adapt(cast, case.method, jax.random.key(5))
    for leaf in jax.tree.leaves(jax.eval_shape(jaxft.merge, params)):
        assert leaf.dtype == jnp.bfloat16


def test_a_step_moves_all_that_trains_and_a_second_compiles_nothing(row, caplog):
    trainable, frozen = jaxft.partition(row.randomised().params, row.method)

    @jax.jit
    def step(trainable, frozen):
        gradient = jax.grad(lambda tree: loss(row, tree, frozen))(trainable)
        update = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.01, leaf.dtype), gradient)
        return jax.tree.map(jnp.subtract, trainable, update)

    moved = step(trainable, frozen)
    for before, after in zip(jax.tree.leaves(trainable), jax.tree.leaves(moved), strict=True):
        assert bool(jnp.any(before != after))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        step(moved, frozen)
    assert not [said for said in caplog.messages if "step" in said]


def test_a_scan_over_a_stacked_weight_equals_the_loop(name, make):
    case = make(name, "stacked").randomised()
    x = case.base.x
    for kernel in jaxft.materialize(case.weight):
        x = x + jnp.tanh(x @ kernel)[:, : x.shape[-1]]
    assert_close(case.base.apply(case.params, case.base.x), x)


@settings(max_examples=6, deadline=None)
@given(
    shape=st.sampled_from([(5, 3), (4, 8)]),
    rank=st.sampled_from([1, 3]),
    alpha=st.floats(0.5, 64.0),
    seed=st.integers(0, 99),
)
def test_merged_equals_adapted_at_any_shape_rank_and_scale(adapter, shape, rank, alpha, seed):
    chosen = {"rank": rank, "alpha": alpha}
    method = METHODS[adapter](
        **{key: value for key, value in chosen.items() if key in defaults(adapter)}
    )
    keys = jax.random.split(jax.random.key(seed), 3)
    params = jaxft.adapt({"q_proj": {"kernel": jax.random.normal(keys[0], shape)}}, method, keys[1])
    trainable, frozen = jaxft.partition(params, method)
    trainable = jax.tree.map(lambda leaf: jax.random.normal(keys[2], leaf.shape), trainable)
    params = jaxft.combine(trainable, frozen)
    x = jax.random.normal(keys[1], (4, shape[0]))
    adapted = jaxft.contract(x, jaxft.bind(params, params)["q_proj"]["kernel"])
    dense = jaxft.merge(params)["q_proj"]["kernel"]
    assert_close(adapted, x @ dense)
