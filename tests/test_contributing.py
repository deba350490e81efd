"""CONTRIBUTING.md's "How to add a method" and "How to add a family" are executed as they stand."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft import methods
from jaxft.configuration import from_json, load_config
from jaxft.errors import UserError
from jaxft.models import FAMILIES, Config, Transformer
from jaxft.models.transformer import initial_params
from jaxft.objectives import objective, sft
from jaxft.runs.best import best_step
from jaxft.runs.metrics import read_metrics
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
ADAPTER = "adapter_model.safetensors"
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


@pytest.fixture
def wider(monkeypatch):
    """The configuration of the family `wider`, from the page's file."""
    section = PAGE.split("## How to add a family")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = types.ModuleType("jaxft.models.families.wider")
    exec(compile(source, "wider.py", "exec"), module.__dict__)
    monkeypatch.setitem(FAMILIES, "wider", module.FAMILY)
    parts = ((2, ()), (1, (("intermediate", 20),)))
    return dataclasses.replace(CONFIG, family="wider", layers=3, parts=parts)


def test_the_family_added_by_the_page_is_written_and_read_back_bit_for_bit(wider, tmp_path):
    params = initial_params(wider, jax.random.key(0))
    jaxft.save(Transformer(wider), params, tmp_path / "model")
    model, again = jaxft.load(tmp_path / "model")
    assert model.config == wider
    before, after = flatten_with_paths(params), dict(flatten_with_paths(again))
    assert {path for path, _ in before} == after.keys()
    for path, leaf in before:
        np.testing.assert_array_equal(leaf, after[path])
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert names["model.layers.2.mlp.up_proj.weight"].shape == (20, 8)
    assert names["model.layers.1.mlp.up_proj.weight"].shape == (12, 8)


def test_its_layers_keep_their_numbers_in_an_adapter(wider, tmp_path):
    params = initial_params(wider, jax.random.key(0))
    method = methods.lora(rank=2, targets=("up_proj",), layers_to_transform=(1, 2))
    adapted = jaxft.adapt(params, method, jax.random.key(1))
    assert adapted["layers_0"]["mlp"]["up_proj"]["kernel"].ranks == (0, 2)
    trainable, frozen = jaxft.partition(adapted, method)
    adapted = jaxft.combine(jax.tree.map(lambda leaf: leaf + 0.1, trainable), frozen)
    jaxft.save_adapter(adapted, tmp_path / "adapter", method=method)
    modules = {name.split(".lora")[0] for name in load_file(tmp_path / "adapter" / ADAPTER)}
    assert modules == {f"base_model.model.model.layers.{layer}.mlp.up_proj" for layer in (1, 2)}
    tokens = TOKENS[:, :3]
    expected = Transformer(wider).apply({"params": adapted}, tokens)
    again = jaxft.load_adapter(params, tmp_path / "adapter")
    found = Transformer(wider).apply({"params": again}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(found, Transformer(wider).apply({"params": params}, tokens), atol=1e-5)


def test_the_page_names_only_what_is_there():
    root = Path(__file__).parents[1]
    listed = re.findall(r"^    ((?:jaxft|tests|configs|experiments)\S*/\S*)", PAGE, re.MULTILINE)
    assert listed
    assert all((root / path).exists() for path in listed)


@pytest.fixture
def dft(monkeypatch, tmp_path):
    """The row `dft`, from the page's three blocks: the loss's file, the row for objective.py, and the recipe."""
    section = PAGE.split("## How to add an objective")[1].split("\n## ")[0]
    loss_file, row, recipe = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len((loss_file + row + recipe).splitlines()) < 60
    module = types.ModuleType("jaxft.objectives.dft")
    exec(compile(loss_file, "dft.py", "exec"), module.__dict__)
    table = vars(objective) | {"dft": module.dft}
    exec(compile(row, "objective.py", "exec"), table)
    monkeypatch.setitem(objective.OBJECTIVES, "dft", table["DFT"])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dft.py").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return table["DFT"]


def batch():
    ones = jnp.ones((2, 6))
    positions = jnp.broadcast_to(jnp.arange(6)[None, :], (2, 6))
    return {
        "tokens": TOKENS,
        "segments": ones.astype(jnp.int32),
        "positions": positions,
        "weights": ones,
    }


def test_the_objective_added_by_the_page_is_what_it_says(dft):
    """With power 0 it is sft's; its derivative with 1 is that of -sum p; what it reports, the row names."""
    plain, _ = dft.loss({"power": 0.0})(CONFIG, PARAMS, batch())
    total, tokens = sft(CONFIG, PARAMS, batch())
    np.testing.assert_allclose(plain, total, rtol=1e-6)
    loss = dft.loss({"power": 1.0})
    _, counted = loss(CONFIG, PARAMS, batch())
    assert counted.weight == tokens == 10
    assert counted.sums.keys() == {metric.name for metric in dft.metrics[1:]}

    def bent(shift, function):
        head = PARAMS["head"]["kernel"] * (1.0 + shift)
        return function({**PARAMS, "head": {"kernel": head}})

    slope = jax.grad(bent)(0.0, lambda params: loss(CONFIG, params, batch())[0])
    up, down = (
        -bent(shift, lambda params: loss(CONFIG, params, batch())[1].sums["probability"][0])
        for shift in (1e-2, -1e-2)
    )
    np.testing.assert_allclose(slope, (up - down) / 2e-2, rtol=1e-2)


def test_the_objective_added_by_the_page_trains(dft, tmp_path, capsys):
    """By its recipe, with a key of its own; the best checkpoint is that of the highest probability."""
    rows = [{"prompt": f"{n}", "completion": f" {n + 1}"} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data.train": "data.jsonl",
        "data.eval": "data.jsonl",
        "data.max_length": 16,
        "objective.power": 0.5,
        "method.rank": 2,
        "method.targets": ("q_proj",),
        "optimizer.learning_rate": 1e-2,
        "batch_size": 4,
        "eval_batch_size": 4,
        "steps": 4,
        "eval_every": 1,
        "checkpoint.best": True,
        "samples.count": 0,
        "mesh.data": 1,
    }
    config = load_config("configs/dft.py:lora", settings)
    with jax.numpy_dtype_promotion("standard"):
        result = jaxft.train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = {line["step"]: line["probability"] for line in lines if line["split"] == "eval"}
    assert sorted(held_out) == [0, 1, 2, 3, 4]
    assert max(held_out, key=held_out.__getitem__) == best_step(held_out, "higher") == 4
    assert "step 4: held-out probability" in capsys.readouterr().err
    assert 0 < result.metrics["train_probability"] < 1
    assert from_json((tmp_path / "run" / "config.json").read_text()).objective.power == 0.5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective.name": "dftt"}, "config.objective.name takes dft here, not 'dftt' (nearest: 'dft'"),
        ({"objective.name": "dpo"}, "dpo begins with another recipe, as configs/dpo.py:lora"),
        ({"objective.pwer": 1.0}, "nearest: config.objective.power"),
    ],
)  # fmt: skip
def test_the_configuration_knows_the_new_objective(dft, settings, says):
    with pytest.raises(UserError) as caught:
        load_config("configs/dft.py:lora", settings)
    assert says in str(caught.value)
