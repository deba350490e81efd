"""Many PEFT adapters in one batch, compared with what PEFT says."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.weights import slots_of

# Every way in which PEFT adapts the golden llama: kinds, scales, ranks, layers, targets, the embedding, the head.
NAMES = [
    "lora",
    "rslora",
    "dora",
    "vera",
    "vera_unsaved",
    "patterns",
    "patterns_rsdora",
    "layers",
    "layers_dora",
    "embedding",
    "embedding_dora",
    "head",
    "head_dora",
]


@pytest.fixture(scope="module")
def bank(golden_folder):
    _, params = jaxft.load(golden_folder / "models" / "llama")
    return jaxft.stack_adapters(
        params, {name: golden_folder / "adapters" / name for name in NAMES}, slots=len(NAMES) + 1
    )


@pytest.fixture(scope="module")
def golden_folder(request):
    return request.path.parents[1] / "golden"


def indices(bank, names):
    slots = slots_of(bank)
    return jnp.asarray([slots.index(name) if name else -1 for name in names], jnp.int32)


def test_each_row_of_a_mixed_batch_says_what_peft_says_with_its_adapter(
    bank, golden, model_of, logits_of, deviation
):
    model, params = model_of("llama")
    found = [np.load(golden / "adapters" / name / "expected.npz") for name in NAMES]
    ids = np.stack([one["input_ids"][0] for one in found] + [found[0]["input_ids"][0]])
    groups = indices(bank, [*NAMES, None])
    logits = logits_of(model, jaxft.bind_groups(bank, groups), ids)
    for row, (name, one) in enumerate(zip(NAMES, found, strict=True)):
        assert deviation(logits[row : row + 1], one["logits"][:1]) < 2e-5, name
    np.testing.assert_allclose(logits[-1], logits_of(model, params, ids)[-1], rtol=1e-5, atol=1e-5)


def test_a_mixed_batch_is_as_pefts(bank, golden, model_of, logits_of, deviation):
    model, _ = model_of("llama")
    expected = np.load(golden / "adapters" / "mixed.npz")
    names = [name if name != "__base__" else None for name in expected["adapter_names"]]
    bound = jaxft.bind_groups(bank, indices(bank, names))
    logits = logits_of(model, bound, expected["input_ids"])
    assert deviation(logits, expected["logits"]) < 2e-5


def test_an_adapter_put_into_a_free_slot_says_what_peft_says(
    bank, golden, model_of, logits_of, deviation
):
    model, params = model_of("llama")
    roomy = jaxft.stack_adapters(params, {}, slots=2, rank=8, targets=("all-linear",), dora=True)
    for name in ("patterns", "dora"):
        roomy = jaxft.put_adapter(roomy, name, golden / "adapters" / name, index=1)
        expected = np.load(golden / "adapters" / name / "expected.npz")
        bound = jaxft.bind_groups(roomy, jnp.asarray([1, 1], jnp.int32))
        logits = logits_of(model, bound, expected["input_ids"])
        assert deviation(logits, expected["logits"]) < 2e-5, name
        roomy = jaxft.put_adapter(roomy, None, None, index=1)
    logits = logits_of(model, bound, expected["input_ids"])
    empty = logits_of(
        model, jaxft.bind_groups(roomy, jnp.asarray([1, 1], jnp.int32)), expected["input_ids"]
    )
    plain = logits_of(model, params, expected["input_ids"])
    np.testing.assert_allclose(empty, plain, rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits, plain)


def test_what_a_bank_cannot_hold_is_refused_in_one_line(bank, golden, model_of):
    _, params = model_of("llama")
    adapters = golden / "adapters"
    for folder, said in [
        ("save_norm", "adapter 'x' has a final_norm/scale of its own"),
        ("save_head", "adapter 'x' has a head/kernel of its own"),
        ("gpt2", "gpt2"),
    ]:
        with pytest.raises(UserError, match=said):
            jaxft.stack_adapters(params, {"x": adapters / folder})
    small = jaxft.stack_adapters(params, {"a": adapters / "rslora"}, slots=2)
    for call, said in [
        (lambda: jaxft.stack_adapters(bank, {"x": adapters / "lora"}), "is adapted already"),
        (lambda: jaxft.stack_adapters(params, {}), "no adapter is given, and no slots"),
        (
            lambda: jaxft.stack_adapters(params, {}, slots=1, targets=("q_pro",)),
            "nearest: 'q_proj'",
        ),
        (lambda: jaxft.put_adapter(params, "x", adapters / "lora"), "the tree is no bank"),
        (lambda: jaxft.put_adapter(small, "x", adapters / "lora"), "no room at layers"),
        (lambda: jaxft.put_adapter(small, "x", adapters / "rslora", index=2), "0 to 1"),
        (lambda: jaxft.put_adapter(small, "a", adapters / "rslora", index=1), "is at index 0"),
        (lambda: jaxft.put_adapter(small, None, adapters / "rslora"), "go together"),
    ]:
        with pytest.raises(UserError, match=said):
            call()
    full = jaxft.put_adapter(small, "b", adapters / "rslora")
    with pytest.raises(UserError, match="all 2 slots of the bank are taken"):
        jaxft.put_adapter(full, "c", adapters / "rslora")
    assert slots_of(full).names == ("a", "b")
