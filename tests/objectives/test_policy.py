"""Policy losses: TRL's values and gradients, the papers' formulas where TRL has none, and what masks keep out."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft.errors import UserError
from jaxft.objectives import policy
from jaxft.objectives.policy import (
    LOSSES,
    divergence,
    of_highest_entropy,
    policy_loss,
    rewards_less_kl,
    without_truncated,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "policy.json").read_text())
ARRAYS = ("log_probabilities", "old", "reference", "advantages", "mask", "entropies")
# The masked places of one row of three, and its numbers.
NEW = jnp.asarray([[-1.0, -2.0, -0.5, 9.0], [-0.3, -4.0, 9.0, 9.0]])
OLD = jnp.asarray([[-1.3, -1.9, -0.5, 9.0], [-0.2, -4.5, 9.0, 9.0]])
MASK = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0]])
GAINS = jnp.asarray([0.7, -1.1])


def batch_of(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(GOLDEN["batches"][name][key]) for key in ARRAYS}


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: str(case["settings"]))
def test_values_and_gradients_are_trls(case):
    """Of each loss that it has: at token and sequence level, with every clip and KL, on batches of four and of one."""
    batch, asked = batch_of(case["batch"]), dict(case["settings"])
    share, on_policy = asked.pop("share", None), asked.pop("on_policy", False)
    focus = None if share is None else of_highest_entropy(batch["entropies"], batch["mask"], share)
    rest = {"reference": batch["reference"]} if "beta" in asked else {}

    def loss(new):
        old = None if on_policy else batch["old"]
        sizes = {"longest": GOLDEN["longest"], "items": GOLDEN["items"]}
        return policy_loss(
            new, old, batch["advantages"], batch["mask"], **asked, **rest, **sizes, focus=focus
        )

    value, gradient = jax.value_and_grad(loss)(batch["log_probabilities"])
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-5, atol=1e-6)


def test_gspo_is_grpo_at_sequence_level():
    """And the gradient of a token is verl's: s_i A / length, whatever the token's own ratio."""
    asked = {"epsilon": 10.0}
    gspo = policy_loss(NEW, OLD, GAINS, MASK, loss="gspo", **asked)
    assert gspo == policy_loss(NEW, OLD, GAINS, MASK, loss="grpo", importance="sequence", **asked)
    gradient = jax.grad(lambda new: policy_loss(new, OLD, GAINS, MASK, loss="gspo", **asked))(NEW)
    d = np.where(MASK, NEW - OLD, 0).sum(1) / [3, 2]
    want = -np.exp(d) * np.asarray(GAINS) / [3, 2] / 2
    np.testing.assert_allclose(gradient, np.where(MASK, want[:, None], 0), rtol=1e-5)


def test_reinforce_pp_clips_each_tokens_own_advantage():
    """verl's `vanilla` with `token-mean`, written out."""
    gains = jnp.asarray([[0.5, -0.2, 0.9, 9.0], [-1.0, 0.3, 9.0, 9.0]])
    want = 0.0
    for row in range(2):
        for place in range(int(MASK[row].sum())):
            ratio = np.exp(NEW[row, place] - OLD[row, place])
            gain = gains[row, place]
            want += max(-ratio * gain, -np.clip(ratio, 0.8, 1.2) * gain) / 5
    value = policy_loss(NEW, OLD, gains, MASK, loss="reinforce_pp")
    np.testing.assert_allclose(value, want, rtol=1e-6)


def test_remax_is_the_policy_gradient():
    value = policy_loss(NEW, OLD, GAINS, MASK, loss="remax", items=10)
    np.testing.assert_allclose(value, -(0.7 * -3.5 + -1.1 * -4.3) / 10, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_all_losses_have_the_policy_gradients_direction(loss):
    """rho = 1: a token's gradient is -A times a factor of its row's length alone."""
    gradient = jax.grad(lambda new: policy_loss(new, None, GAINS, MASK, loss=loss))(NEW)
    ascent = -gradient / GAINS[:, None]
    assert jnp.all(jnp.where(MASK == 1, ascent > 0, gradient == 0))
    assert jnp.allclose(ascent[0, 0], ascent[0, 2])


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_divergences_are_schulmans(kl):
    d = np.asarray([0.3, -0.1, 2.0])
    want = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) + d - 1}[kl]
    found = divergence(jnp.asarray([d - 1]), jnp.full((1, 3), -1.0), jnp.ones((1, 3)), kl)
    np.testing.assert_allclose(found[0], want, rtol=1e-5)


def test_kl_stands_in_the_loss_or_in_the_reward():
    reference = NEW - 0.2
    plain = policy_loss(NEW, None, GAINS, MASK, loss="grpo")
    inside = policy_loss(
        NEW, None, GAINS, MASK, loss="grpo", beta=0.5, kl="k1", reference=reference
    )
    np.testing.assert_allclose(inside - plain, 0.5 * 0.2, rtol=1e-5)
    rewards = rewards_less_kl(jnp.asarray([1.0, 2.0]), NEW, reference, MASK, beta=0.5)
    np.testing.assert_allclose(rewards, [1.0 - 0.3, 2.0 - 0.2], rtol=1e-5)


def test_a_truncated_completion_can_be_left_out():
    ended = jnp.asarray([True, False])
    masked = without_truncated(MASK, ended)
    value = policy_loss(NEW, OLD, GAINS, masked)
    assert value == policy_loss(NEW[:1], OLD[:1], GAINS[:1], MASK[:1])


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    """With the tokens of the whole update given, the parts' losses have the batch's sum or mean."""
    if loss == "bnpo":
        return  # it divides by a micro-batch's own tokens: by its definition they do not
    sizes = {"items": 5, "longest": 4}
    whole = policy_loss(NEW, OLD, GAINS, MASK, loss=loss, **sizes)
    parts = [
        policy_loss(NEW[row, None], OLD[row, None], GAINS[row, None], MASK[row, None], loss=loss, **sizes)
        for row in range(2)
    ]  # fmt: skip
    summed = LOSSES[loss].mean is policy.over_all_tokens
    np.testing.assert_allclose(sum(parts) / (1 if summed else 2), whole, rtol=1e-5)


def test_bnpo_divides_by_a_micro_batchs_own_tokens():
    parts = [
        policy_loss(NEW[row, None], None, GAINS[row, None], MASK[row, None], loss="bnpo")
        for row in range(2)
    ]
    np.testing.assert_allclose(parts, -GAINS, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    mask=arrays.arrays(np.bool_, (3, 4)),
    rubbish=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 0.0]),
    loss=st.sampled_from(sorted(LOSSES)),
    importance=st.sampled_from(["token", "sequence"]),
)
def test_nothing_of_a_masked_place_reaches_value_or_gradient(mask, rubbish, loss, importance):
    draw = np.random.default_rng(0)
    clean = [jnp.asarray(np.where(mask, draw.normal(size=(3, 4)), 0), jnp.float32) for _ in "nor"]
    dirty = [jnp.where(mask, x, rubbish) for x in clean]
    gains = jnp.asarray([1.0, -0.5, 2.0])

    def run(new, old, reference):
        rest = {"reference": reference, "beta": 0.1, "loss": loss, "importance": importance}
        return policy_loss(new, old, gains, mask, **rest)

    values = [jax.value_and_grad(run, argnums=(0, 1, 2))(*x) for x in (clean, dirty)]
    jax.tree.map(np.testing.assert_array_equal, *values)
    assert not np.any(np.asarray(values[0][1][0])[~mask])
    assert all(map(np.all, map(np.isfinite, jax.tree.leaves(values))))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_endless_ratio_has_no_gradient_rather_than_nan(loss):
    far = jnp.asarray([[-1.0, -300.0]])
    for new, old in ((far, jnp.zeros((1, 2)) - 1.0), (jnp.zeros((1, 2)) - 1.0, far)):
        for gain in (1.0, -1.0):
            gains, mask = jnp.asarray([gain]), jnp.ones((1, 2))
            gradient = jax.grad(policy_loss)(new, old, gains, mask, loss=loss)
            assert jnp.all(jnp.isfinite(gradient))


def test_only_the_policys_own_log_probabilities_have_a_gradient_in_the_advantages():
    gradient = jax.grad(lambda gains: policy_loss(NEW, OLD, gains, MASK))(GAINS)
    assert not jnp.any(gradient)


def test_half_precision_is_computed_in_single():
    new, old = NEW.astype(jnp.bfloat16), OLD.astype(jnp.bfloat16)
    value = policy_loss(new, old, GAINS, MASK)
    assert value.dtype == jnp.float32
    assert value == policy_loss(new.astype(jnp.float32), old.astype(jnp.float32), GAINS, MASK)


def test_it_is_public_with_the_promised_arguments():
    taken = inspect.signature(jaxft.policy_loss).parameters
    assert list(taken)[:4] == ["log_probabilities", "old", "advantages", "mask"]
    promised = {
        "reference": None, "loss": "dapo", "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0,
        "kl": "k3", "kl_corrected": True, "importance": "token", "longest": None, "items": None,
    }  # fmt: skip
    assert {name: taken[name].default for name in promised} == promised


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss": "drgrpo"}, "unknown loss 'drgrpo'.*nearest: 'dr_grpo'"),
        ({"kl": "k4"}, "unknown kl 'k4': known are k1, k2, k3"),
        ({"importance": "tokens"}, "unknown importance 'tokens'.*nearest: 'token'"),
        ({"beta": 0.1}, "reference is needed"),
        ({"old": OLD[:, :2]}, r"old has shape \(2, 2\) and mask \(2, 4\)"),
        ({"mask": MASK[0]}, r"log_probabilities has shape \(2, 4\) and mask \(4,\)"),
        ({"advantages": GAINS[:1]}, r"advantages have shape \(1,\): \(2,\) or \(2, 4\)"),
        ({"focus": MASK[:1]}, r"focus has shape \(1, 4\) and mask \(2, 4\)"),
        ({"items": [3, 4]}, r"items: one number is expected, at least 0, not \[3, 4\]"),
        ({"longest": -1}, "longest: one number is expected"),
        ({"advantages": NEW, "loss": "rloo"}, r"advantages have shape \(2, 4\): \(2,\) is"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(asked, message):
    given = {"log_probabilities": NEW, "old": OLD, "advantages": GAINS, "mask": MASK} | asked
    with pytest.raises(UserError, match=message) as error:
        policy_loss(**given)
    assert "\n" not in str(error.value)
