"""LoftQ and PiSSA over a base that is quantized while it streams, and what of them is stored."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load, load_adapted, load_adapter
from jaxft.methods import lora
from jaxft.weights import LowRankStart, materialize, weights_of

KEY = jax.random.key(0)
TOKENS = np.arange(20).reshape(2, 10) % 90 + 3


def residual(params, dense) -> float:
    """The norm of what the adapted projections are off the dense ones."""
    found = dict(weights_of(params["layers"]))
    total = 0.0
    for path, weight in found.items():
        first, second, _ = path.split("/")
        kernel = dense["layers"][first][second]["kernel"]
        total += float(np.sum(np.square(np.asarray(jax.jit(materialize)(weight)) - kernel)))
    return total**0.5


@pytest.mark.parametrize(
    ("init", "iterations"), [("loftq", 1), ("loftq", 3), ("pissa", 1), ("pissa", 3)]
)
def test_the_error_is_smaller_than_plain_nf4s(golden, model_of, init, iterations):
    _, dense = model_of("llama")
    _, plain = load(golden / "models/llama", quantize="nf4")
    method = lora(rank=8, init=init, init_iterations=iterations)
    _, params = load_adapted(golden / "models/llama", method, KEY, quantize="nf4")
    assert residual(params, dense) < 0.7 * residual(plain, dense)
    kinds = {type(weight) is LowRankStart for _, weight in weights_of(params["layers"])}
    assert kinds == {init == "pissa" or iterations > 1}


def test_layers_and_kernels_that_are_not_adapted_are_quantized_as_ever(golden):
    folder = golden / "models/llama"
    method = lora(rank=4, init="pissa", targets=("q_proj",), layers_to_transform=(1,))
    _, params = load_adapted(folder, method, KEY, quantize="nf4")
    _, plain = load(folder, quantize="nf4")
    attention, expected = params["layers"]["attention"], plain["layers"]["attention"]
    same = attention["q_proj"]["kernel"].base.blocks.codes == expected["q_proj"]["kernel"].blocks.codes  # fmt: skip
    assert [bool(layer.all()) for layer in same] == [True, False, True]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), attention["k_proj"], expected["k_proj"]))  # fmt: skip


@pytest.mark.parametrize(("init", "quantize"), [("pissa", "nf4"), ("loftq", "nf4"), ("pissa", "none")])  # fmt: skip
def test_what_is_stored_gives_the_same_logits(golden, tmp_path, logits_of, deviation, init, quantize):  # fmt: skip
    """The adapter over the folder that its card names: the moved base, the rounded one, or the dense one."""
    source = golden / "models/llama"
    method = lora(rank=4, init=init)
    model, params = load_adapted(source, method, KEY, quantize=quantize)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.1 if path[-1] == jax.tree_util.GetAttrKey("b") else leaf, params
    )
    base, options = source, {"quantize": quantize}
    if quantize == "nf4" and init == "pissa":
        with pytest.raises(UserError, match="the adapter's start was taken off its base"):
            jaxft.save_adapter(params, tmp_path / "adapter", method=method)
        base, options = tmp_path / "base", {}
        jaxft.save(model, jaxft.base_tree(params), base, like=source)
    jaxft.save_adapter(params, tmp_path / "adapter", method=method, base=base)
    _, read = load(base, **options)
    found = logits_of(model, load_adapter(read, tmp_path / "adapter"), TOKENS)
    assert deviation(found, logits_of(model, params, TOKENS)) < 1e-5
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"it began by {init}" in card
    assert ("lacks that start" in card) == (init == "pissa" and quantize == "nf4")
    assert str(base) in card


def test_what_cannot_be_stored_or_begun_is_refused(golden):
    folder = golden / "models/llama"
    with pytest.raises(UserError, match="has to be written beside the adapter, and int8 in groups"):
        load_adapted(folder, lora(rank=2, init="pissa"), KEY, quantize="int8", group_size=8)
    with pytest.raises(
        UserError, match=r"is quantized already \(gptq\).*the dense folder is needed"
    ):
        load_adapted(golden / "packed/gptq", lora(rank=2, init="pissa"), KEY, quantize="nf4")
    with pytest.raises(UserError, match="has no 33 principal parts"):
        load_adapted(folder, lora(rank=33, init="loftq"), KEY, quantize="nf4")
