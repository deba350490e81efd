"""The preference objective on packed pairs: one prompt for two completions changes no number."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.data.preferences import collate_comparisons, comparison
from jaxft.models import Config
from jaxft.models.transformer import hidden_states, initial_params, logits
from jaxft.objectives import LOSSES, averages, settings_of
from jaxft.objectives.cross_entropy import collision_log_probabilities
from jaxft.objectives.pairs import (
    completion_log_probabilities,
    preference_loss,
    with_likelihood_scale,
)

LLAMA = Config(
    family="llama",
    vocabulary=61,
    hidden=16,
    intermediate=32,
    layers=2,
    heads=4,
    key_heads=2,
    head_dim=8,
    max_length=256,
    query_scale=8**-0.5,
    tied=True,
)
GEMMA = dataclasses.replace(
    LLAMA,
    windows=(7, 0),
    attention_softcap=2.0,
    logit_softcap=3.0,
    norm_offset=1.0,
    norm_place="both",
)
GPT2 = dataclasses.replace(
    LLAMA,
    key_heads=4,
    positions="learned",
    norm="layer",
    fused_qkv=True,
    gated=False,
    activation="gelu",
)
SETTINGS = {
    "name": "dpo",
    "beta": 0.3,
    "label_smoothing": 0.0,
    "length_normalize": False,
    "gamma": 0.5,
    "tau": 0.05,
    "sft_weight": 0.0,
    "f_divergence": "reverse_kl",
    "alpha": 0.5,
    "wpo": False,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}  # fmt: skip
LENGTHS = [(9, 4, 6), (1, 3, 2), (0, 4, 5), (30, 11, 1), (12, 1, 20), (5, 5, 5)]


def settings(**changes):
    return settings_of(SETTINGS | changes)


@functools.lru_cache
def params_of(config, seed=0):
    """A model whose logits differ: larger kernels than those of a fresh one."""
    drawn = initial_params(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x * jnp.asarray(6.0 if x.ndim > 1 else 1.0, x.dtype), drawn)


def sequences(seed=0):
    """(prompt, chosen, rejected) of token ids; among them prompts of one token and of none."""
    draw = np.random.default_rng(seed)
    return [[draw.integers(1, 61, n).tolist() for n in lengths] for lengths in LENGTHS]


def batch_of(rows, *, share=True, length=128, slots=4, labels=None, **more):
    """A batch of rows of pairs, given by their places in `sequences()`."""
    known = sequences()
    examples = [
        [
            dataclasses.replace(
                comparison(*known[place], origin=f"pairs:{place}", share=share),
                index=place,
                label=1.0 if labels is None else labels[place],
                **more,
            )
            for place in row
        ]
        for row in rows
    ]
    return collate_comparisons(examples, batch_size=len(rows), length=length, pad_id=0, slots=slots)


PACKED = [[0, 1, 2], [3, 4], [5], []]


@functools.partial(jax.jit, static_argnums=0)
def each_log_probability(config, params, tokens):
    """Of every token but the first, from all logits of a row (1, length)."""
    scores = logits(config, params, hidden_states(config, params, tokens))[0]
    return jax.nn.log_softmax(scores)[jnp.arange(tokens.shape[1] - 1), tokens[0, 1:]]


def log_probability(config, params, prompt, completion):
    """Of one completion, from all logits of its own sequence. Behind it stand tokens that it cannot see."""
    alone = [*prompt, *completion]
    tokens = jnp.asarray([alone + [0] * (48 - len(alone))], jnp.int32)
    each = np.asarray(each_log_probability(config, params, tokens))
    return float(each[max(len(prompt) - 1, 0) : len(alone) - 1].sum())


@pytest.mark.parametrize("config", [LLAMA, GEMMA, GPT2], ids=["plain", "window_softcap", "learned"])
@pytest.mark.parametrize("share", [True, False])
def test_packed_pairs_equal_separate_runs(config, share):
    """To 1e-5 relative, with every attention kind; prompts of one token and of none among them."""
    params, batch = params_of(config), batch_of(PACKED, share=share)
    found = jax.jit(functools.partial(completion_log_probabilities, config))(params, batch)
    for row, slot in np.argwhere(batch["present"]):
        prompt, *completions = sequences()[batch["index"][row, slot]]
        for side in range(2):
            wanted = log_probability(config, params, prompt, completions[side])
            np.testing.assert_allclose(found[side][row, slot], wanted, rtol=1e-5, atol=1e-5)


def test_sharing_saves_the_prompt():
    """A pair takes its prompt once, and one token more."""
    prompt, chosen, rejected = sequences()[3]
    shared, apart = (
        comparison(prompt, chosen, rejected, origin="", share=s) for s in (True, False)
    )
    assert len(shared.tokens) == len(prompt) + len(chosen) + len(rejected) + 1
    assert len(apart.tokens) == 2 * len(prompt) + len(chosen) + len(rejected)
    assert shared.trained.sum() == apart.trained.sum() == len(chosen) + len(rejected)


@functools.cache
def compiled(name, changes):
    """(params, batch, *reference) -> ((mean loss, sums), gradient)."""
    chosen = settings(name=name, **dict(changes))

    def total(params, batch, *reference):
        whole, beside = preference_loss(LLAMA, params, batch, *reference, settings=chosen)
        return whole / beside.weight, beside

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(name, batch, **changes):
    """(mean loss, averages, gradient) of a loss on a batch, against the reference of other parameters."""
    reference = () if LOSSES[name].free else (params_of(LLAMA, 1),)
    program = compiled(name, tuple(changes.items()))
    (loss, beside), gradient = program(params_of(LLAMA), batch, *reference)
    return loss, averages(beside.sums), gradient


SOME = {
    "dpo": {"sft_weight": 0.5, "wpo": True},
    "ipo": {"length_normalize": True},
    "aot": {"label_smoothing": 0.1},
    "orpo": {},
    "simpo": {"beta": 2.0},
    "kto": {},
}


@pytest.mark.parametrize("name", SOME)
def test_packing_and_sharing_change_nothing(name):
    """Loss, metrics and gradient of six pairs: in packed rows, one a row, and with prompts written twice."""
    labels = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    alone = [[place] for place in range(6)]
    layouts = [(alone, False), (PACKED, True), *([(alone, True)] if name == "dpo" else [])]
    first, *others = [
        run(name, batch_of(rows, share=share, labels=labels), **SOME[name])
        for rows, share in layouts
    ]
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), first, other
        )


def test_parts_add_up_with_a_likelihood_term():
    """Its scale is the whole batch's: the sums of two parts are those of the batch."""
    chosen = settings(sft_weight=0.7)
    loss = jax.jit(functools.partial(preference_loss, LLAMA, params_of(LLAMA), settings=chosen))
    batch = batch_of(PACKED)
    noted = with_likelihood_scale(batch, settings=chosen)
    whole, _ = loss(batch)
    halves = [
        {key: value[rows] for key, value in noted.items()} for rows in (slice(1), slice(1, 4))
    ]
    parts = [loss(half)[0] for half in halves]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_known_log_probabilities_take_the_references_place():
    """A batch that holds them needs no reference."""
    reference = params_of(LLAMA, 1)
    batch = batch_of(PACKED)
    of_pairs = jax.jit(functools.partial(completion_log_probabilities, LLAMA))
    pair = of_pairs(reference, batch)
    known = {**batch, "reference": np.stack([np.asarray(x) for x in pair], -1)}
    with_model, _, _ = run("dpo", batch)
    loss = jax.jit(functools.partial(preference_loss, LLAMA, settings=settings()))
    alone, _ = loss(params_of(LLAMA), known)
    np.testing.assert_allclose(alone / 6, with_model, rtol=1e-6)


def test_metrics_are_means_over_pairs():
    """Rewards are beta r, whatever the row a pair stands in."""
    batch = batch_of(PACKED)
    _, found, _ = run("dpo", batch)
    ratios = np.zeros((6, 2))
    for place, (prompt, *completions) in enumerate(sequences()):
        for side in range(2):
            ratios[place, side] = log_probability(
                LLAMA, params_of(LLAMA), prompt, completions[side]
            ) - log_probability(LLAMA, params_of(LLAMA, 1), prompt, completions[side])
    chosen, rejected = ratios.T
    lengths = [lengths[1:] for lengths in LENGTHS]
    np.testing.assert_allclose(found["rewards/chosen"], 0.3 * chosen.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        found["rewards/margins"], 0.3 * (chosen - rejected).mean(), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found["rewards/accuracies"], np.mean(chosen > rejected))
    without_first = np.asarray(lengths) - (np.asarray(LENGTHS)[:, :1] == 0)  # nothing predicts it
    np.testing.assert_allclose(found["lengths/chosen"], without_first[:, 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(found["kl"], ratios.sum() / without_first.sum(), rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_collisions_are_sums_of_squares(softcap):
    """log sum_v p(v)^2, in chunks of which the last is ragged."""
    hidden = jax.random.normal(jax.random.key(0), (2, 13, 8))
    head = jax.random.normal(jax.random.key(1), (8, 50))
    scores = hidden @ head
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    wanted = jnp.log(jnp.sum(jnp.square(jax.nn.softmax(scores)), axis=-1))
    found = collision_log_probabilities(hidden, head, softcap=softcap, chunk=5)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def compiled_text(method):
    """The gradient of DPO with a reference, compiled at a shape at which all logits would stand out."""
    wide = dataclasses.replace(LLAMA, vocabulary=32768, hidden=64)
    batch = batch_of([[0, 1], [3], [4], [5]], length=512)
    tree = jaxft.adapt(initial_params(wide, jax.random.key(0)), method, jax.random.key(1))
    trainable, frozen = jaxft.partition(tree, method)

    def total(trainable, frozen, reference):
        params = jaxft.combine(trainable, frozen)
        return preference_loss(wide, params, batch, reference, settings=settings(wpo=True))[0]

    reference = initial_params(wide, jax.random.key(2))
    return jax.jit(jax.grad(total)).lower(trainable, frozen, reference).compile().as_text()


@pytest.mark.parametrize("name", ["lora", "full"])
def test_no_array_of_tokens_by_vocabulary(name):
    """Neither for the policy nor for the reference, and not for the weights of WPO."""
    method = jaxft.methods.lora(rank=4) if name == "lora" else jaxft.methods.full()
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", compiled_text(method))
    ]
    assert max(sizes) < 4 * 512 * 32768 / 4
