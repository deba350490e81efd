"""CONTRIBUTING.md's "How to add a method" is executed as it stands."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import methods
from jaxft.errors import UserError
from jaxft.models import Config, Transformer
from jaxft.models.transformer import initial_params
from jaxft.tree import flatten_with_paths

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
CONFIG = Config(
    family="llama",
    vocabulary=16,
    hidden=8,
    intermediate=12,
    layers=2,
    heads=2,
    key_heads=1,
    head_dim=4,
    max_length=16,
    query_scale=0.5,
)
MODEL, PARAMS = Transformer(CONFIG), initial_params(CONFIG, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)


@pytest.fixture
def ia3(monkeypatch):
    """The row `ia3`, from the page's two blocks: the weight's file and the function for methods.py."""
    section = PAGE.split("## How to add a method")[1]
    weight_file, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = types.ModuleType("jaxft.weights.ia3")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(weight_file, "ia3.py", "exec"), module.__dict__)
    table = vars(methods) | {"IA3": module.IA3}
    exec(compile(row, "methods.py", "exec"), table)
    monkeypatch.setitem(methods.METHODS, "ia3", table["ia3"])
    return table["ia3"]


def run(params):
    return MODEL.apply({"params": params}, TOKENS)


def train(params, method, steps=5):
    trainable, frozen = jaxft.partition(params, method)

    def loss(trainable):
        return jnp.mean(jnp.square(run(jaxft.combine(trainable, frozen)) - 1.0))

    @jax.jit
    def step(trainable):
        value, gradient = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, trainable, gradient), value

    losses = []
    for _ in range(steps):
        trainable, value = step(trainable)
        losses.append(float(value))
    return jaxft.combine(trainable, frozen), losses


def test_the_method_added_by_the_page_starts_trains_and_merges(ia3):
    method = ia3()
    params = jaxft.adapt(PARAMS, method, jax.random.key(2))
    np.testing.assert_array_equal(run(params), run(PARAMS))
    trainable, _ = jaxft.partition(params, method)
    shapes = {path.split("/")[-3]: leaf.shape for path, leaf in flatten_with_paths(trainable)}
    assert shapes == {"k_proj": (2, 4), "v_proj": (2, 4), "down_proj": (2, 12)}
    trained, losses = train(params, method)
    assert losses[-1] < losses[0]
    assert not np.allclose(run(trained), run(PARAMS), atol=1e-6)
    np.testing.assert_allclose(run(jaxft.merge(trained)), run(trained), rtol=1e-4, atol=1e-6)


def test_a_layer_left_out_stays_as_it_is(ia3):
    method = ia3(layers_to_transform=(1,))
    trained, _ = train(jaxft.adapt(PARAMS, method, jax.random.key(2)), method)
    vector = trained["layers"]["attention"]["v_proj"]["kernel"].vector
    np.testing.assert_array_equal(vector[0], jnp.ones(4))
    assert not np.allclose(vector[1], 1.0, atol=1e-7)


def test_the_configuration_and_the_errors_know_the_new_row(ia3):
    assert methods.defaults("ia3")["targets"] == ("k_proj", "v_proj", "down_proj")
    assert "rank" not in methods.defaults("ia3")
    with pytest.raises(UserError, match="method ia3 takes no rank: a vector has no rank"):
        ia3(rank=4)


def test_the_page_names_only_what_is_there():
    root = Path(__file__).parents[1]
    listed = re.findall(r"^    ((?:jaxft|tests|configs|experiments)\S*/\S*)", PAGE, re.MULTILINE)
    assert listed
    assert all((root / path).exists() for path in listed)
