from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.tree import count, flatten_with_paths
from jaxft.weights import common_tree, cropped, padded, saved_in


def tree():
    return {
        "layers": {
            "q_proj": {"kernel": jnp.ones((3, 6, 8))},
            "down_proj": {"kernel": jnp.ones((3, 10, 6))},
        }
    }


def adapted(**settings):
    method = jaxft.methods.vera(rank=4, **settings)
    return jaxft.adapt(tree(), method, jax.random.key(0)), method


def test_the_shared_matrices_stand_once_sized_to_the_largest_kernel():
    params, _ = adapted()
    shapes = {path: leaf.shape for path, leaf in flatten_with_paths(params)}
    assert shapes["vera/a"] == (10, 4)
    assert shapes["vera/b"] == (4, 8)
    assert {path.split("/")[-1] for path in shapes if "kernel" in path} == {"base", "d", "g"}
    assert count(params) == count(tree()) + 10 * 4 + 4 * 8 + 3 * (2 * 4 + 8 + 6)


def test_each_kernel_takes_their_top_left_corner():
    params, _ = adapted()
    weight = jaxft.bind(params["layers"]["q_proj"]["kernel"], params)
    np.testing.assert_array_equal(weight.a, params["vera"]["a"][:6])
    np.testing.assert_array_equal(weight.b, params["vera"]["b"][:, :8])
    one = jax.tree.map(lambda leaf: leaf[0], params["layers"]["down_proj"]["kernel"])
    np.testing.assert_array_equal(jaxft.bind(one, params).b, params["vera"]["b"][:, :6])


def test_they_are_frozen_and_stay_when_merged_away():
    params, method = adapted()
    trainable, frozen = jaxft.partition(params, method)
    assert jax.tree.leaves(trainable["vera"]) == []
    assert frozen["vera"]["a"].shape == (10, 4)
    assert "vera" not in jaxft.merge(params)


def test_the_start_is_the_papers():
    params, _ = adapted(d_initial=0.25)
    kernel = params["layers"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel.d, np.full((3, 4), 0.25))
    np.testing.assert_array_equal(kernel.g, np.zeros((3, 8)))


def test_the_projections_depend_on_their_own_seed_alone():
    """So that an adapter saved without them can be read; the values are PyTorch's for seed 0."""
    first = jaxft.adapt(tree(), jaxft.methods.vera(rank=4), jax.random.key(0))["vera"]
    same = jaxft.adapt(tree(), jaxft.methods.vera(rank=4), jax.random.key(9))["vera"]
    other = jaxft.adapt(tree(), jaxft.methods.vera(rank=4, projection_seed=1), jax.random.key(0))
    np.testing.assert_array_equal(first["a"], same["a"])
    assert not np.allclose(first["a"], other["vera"]["a"])
    assert float(jnp.max(jnp.abs(first["a"]))) <= np.sqrt(6 / 10)
    # torch.rand(3, generator=torch.Generator().manual_seed(0)), spread over (-bound, bound)
    bound = np.sqrt(np.float32(6 / 10))
    drawn = np.asarray([0.49625658988952637, 0.7682217955589294, 0.08847743272781372])
    np.testing.assert_allclose(first["a"][:3, 0], 2 * bound * drawn - bound, rtol=1e-5)


def test_runs_of_other_seeds_stack_and_each_keeps_its_own():
    """`save_adapter` writes it down, so that projections that are left out can be drawn again."""
    runs = [adapted(projection_seed=seed)[0] for seed in (0, 8, 9)]
    assert [saved_in(run).projection_seed for run in runs] == [0, 8, 9]
    like = common_tree(runs)
    for run in runs:
        again = cropped(padded(run, like), run)
        assert saved_in(again) == saved_in(run)
        np.testing.assert_array_equal(again["vera"]["a"], run["vera"]["a"])


def test_a_layer_left_out_stays_at_zero():
    params, method = adapted(layers_to_transform=(1,))
    trainable, frozen = jaxft.partition(params, method)

    def loss(trainable):
        params = jaxft.combine(trainable, frozen)
        return jnp.sum(
            jaxft.materialize(jaxft.bind(params["layers"]["q_proj"]["kernel"], params)) ** 2
        )

    kernel = params["layers"]["q_proj"]["kernel"]
    assert not np.any(kernel.d[jnp.asarray([0, 2])])
    gradient = jax.grad(loss)(trainable)["layers"]["q_proj"]["kernel"]
    assert not np.any(gradient.g[0])
    assert np.any(gradient.g[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_on_the_adapters_input_alone(dropout):
    params, _ = adapted(dropout=dropout)
    bound = jaxft.bind_dropout(params, jax.random.key(3))
    kernel = jax.tree.map(lambda leaf: leaf[0], bound["layers"]["q_proj"]["kernel"])
    x = jnp.ones((5, 6))
    np.testing.assert_array_equal(
        jaxft.contract(x, jaxft.bind(kernel, params)), x @ jnp.ones((6, 8))
    )
    assert (kernel.key is None) == (dropout == 0.0)
