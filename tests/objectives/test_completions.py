"""Rows of rollouts: completions behind one copy of their prompt have the log-probabilities that they have alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import Config
from jaxft.models.transformer import hidden_states, initial_params, logits
from jaxft.objectives import baselines
from jaxft.objectives.completions import (
    collate_completions,
    completion_tokens,
    policy_objective,
    with_items,
)
from jaxft.objectives.rewarding import REWARDING, Judgement, settings_of
from jaxft.training.step import parts_of

CONFIG = Config(
    family="llama",
    vocabulary=40,
    hidden=16,
    intermediate=32,
    layers=2,
    heads=2,
    key_heads=1,
    head_dim=8,
    max_length=64,
)
PROMPTS, GROUP, NEW = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]], 2, 4
KEYS = {
    "epsilon": 0.0, "epsilon_high": 0.0, "delta": 0.0, "beta": 0.0, "kl": "k3", "kl_corrected": True,
    "importance": "token", "entropy_share": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 3, initial_params(CONFIG, jax.random.key(0)))


@pytest.fixture
def batch():
    choose = np.random.default_rng(0)
    count = len(PROMPTS) * GROUP
    lengths = choose.integers(1, NEW + 1, count).astype(np.int32)
    said = choose.integers(3, 40, (count, NEW)).astype(np.int32)
    shape = (len(PROMPTS), GROUP)
    made = collate_completions(PROMPTS, said, lengths, length=16, pad_id=0)
    made["said"] = said
    return made | {
        "counted": lengths.reshape(shape),
        "advantages": choose.normal(size=shape).astype(np.float32),
        "sampled": choose.normal(-3, 0.3, (*shape, NEW)).astype(np.float32),
        "temperature": np.full((len(PROMPTS), 1), 0.7, np.float32),
        "off_policy": np.ones((len(PROMPTS), 1), np.float32),
    }


def alone(params, prompt, said):
    """Log-probabilities and entropies of a completion by itself, by their definition."""
    ids = jnp.asarray([[*prompt, *said]])
    scores = jax.nn.log_softmax(logits(CONFIG, params, hidden_states(CONFIG, params, ids)) / 0.7)[0]
    at = scores[len(prompt) - 1 : -1]
    return at[jnp.arange(len(said)), jnp.asarray(said)], -jnp.sum(jnp.exp(at) * at, axis=-1)


def test_completions_of_one_row_do_not_see_each_other(params, batch):
    found, entropies = completion_tokens(CONFIG, params, batch, entropies=True)
    for index, (said, length) in enumerate(
        zip(batch["said"], batch["counted"].reshape(-1), strict=True)
    ):
        log_p, spread = alone(params, PROMPTS[index // GROUP], said[:length].tolist())
        np.testing.assert_allclose(found[index, :length], log_p, atol=1e-5)
        np.testing.assert_allclose(entropies[index, :length], spread, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("dapo", "bnpo") else pytest.param(name, marks=pytest.mark.thorough)
        for name in REWARDING
    ],
)
def test_parts_of_a_batch_make_the_update_of_the_whole(name, params, batch):
    """Where a loss is a mean over all tokens or sequences; bnpo's is one of each part."""
    settings = settings_of({**KEYS, "name": name})
    batch = with_items({key: value for key, value in batch.items() if key != "said"})

    def summed(some):
        total, counted = policy_objective(CONFIG, params, some, settings=settings)
        return float(total), float(counted.weight)

    whole, count = summed(batch)
    both = parts_of(batch, 2)
    parts = [summed({key: x[number] for key, x in both.items()}) for number in range(2)]
    total, weight = (sum(values) for values in zip(*parts, strict=True))
    assert weight == count == len(PROMPTS) * GROUP
    if name == "bnpo":
        assert total / weight != pytest.approx(whole / count, rel=1e-6)
    else:
        assert total / weight == pytest.approx(whole / count, rel=1e-5)


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "rloo"])
def test_from_answers_of_one_reward_nothing_is_learned(name):
    """Not even what the rounding of their mean leaves; the other group learns as ever."""
    rewards = np.asarray([[0.7]] * 7 + [[0.1]] * 6 + [[0.3]], np.float32)
    known = Judgement(rewards, (1.0,), 7, np.ones((14, 2), bool), np.zeros((14, 2)))
    found = REWARDING[name].baseline({**KEYS, "scale": "group", "combine": "sum"}, known)
    assert jnp.all(found[:7] == 0)
    assert jnp.all(found[7:13] < 0)
    assert jnp.any(baselines.advantages(rewards, 7)[:7] != 0)


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_advantages(params, batch):
    settings = settings_of({**KEYS, "name": "dapo"})
    batch = {key: value for key, value in batch.items() if key not in ("said", "off_policy")}
    total, counted = policy_objective(CONFIG, params, batch, settings=settings)
    lengths, gains = batch["counted"], batch["advantages"]
    assert float(total / counted.weight) == pytest.approx(
        -(lengths * gains).sum() / lengths.sum(), abs=1e-6
    )
    assert float(counted.sums["clip_ratio/region_mean"][0]) == 0


def test_what_stands_behind_a_completions_end_changes_nothing(params, batch):
    settings = settings_of({**KEYS, "name": "grpo"})
    batch.pop("said")
    behind = np.arange(NEW)[None, None] >= batch["counted"][..., None]
    other = batch | {"sampled": np.where(behind, np.nan, batch["sampled"])}
    one, two = (
        policy_objective(CONFIG, params, each, settings=settings)[0] for each in (batch, other)
    )
    assert float(one) == float(two)


def test_a_clip_that_nobody_sets_is_the_papers():
    clips = {name: settings_of({**KEYS, "name": name}).clip for name in REWARDING}
    assert (clips["dapo"].low, clips["dapo"].high) == (0.2, 0.28)
    assert (clips["grpo"].low, clips["grpo"].high) == (0.2, 0.2)
    assert (clips["gspo"].low, clips["gspo"].high) == (3e-4, 4e-4)
    assert clips["cispo"].high == 5.0
    own = settings_of({**KEYS, "name": "dapo", "epsilon": 0.1, "delta": 4.0}).clip
    assert (own.low, own.high, own.delta) == (0.1, 0.1, 4.0)
