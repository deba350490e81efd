"""Each loss is its paper's closed form, and its gradient the slope of it."""

from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import preference as losses
from jaxft.objectives.pairs import LOSSES
from jaxft.objectives.preference import Pair

BETA = 0.5
# Log-probabilities of three pairs under the policy and under the reference.
POLICY = Pair(jnp.asarray([-4.0, -6.0, -3.0]), jnp.asarray([-5.0, -4.0, -9.0]))
REFERENCE = Pair(jnp.asarray([-5.0, -5.5, -3.5]), jnp.asarray([-4.5, -5.0, -7.0]))
RATIOS = ((1.0, -0.5, 0.5), (-0.5, 1.0, -2.0))  # r of chosen and rejected
DELTAS = (1.5, -1.5, 2.5)
MEANS = Pair(jnp.asarray([-0.4, -1.2, -0.8]), jnp.asarray([-0.9, -0.3, -2.0]))
ZERO = jax.tree.map(jnp.zeros_like, MEANS)
SETTINGS = {
    "beta": BETA,
    "label_smoothing": 0.1,
    "gamma": 0.3,
    "tau": 0.05,
    "desirable_weight": 0.7,
    "undesirable_weight": 1.2,
    "present": jnp.ones(3),
    "labels": jnp.asarray([1.0, 0.0, 1.0]),
}


def sigma(x):
    """1 / (1 + e^-x), as the papers write it."""
    return 1.0 / (1.0 + math.exp(-x))


def arguments_of(name):
    """What a loss takes beside policy and reference."""
    taken = list(inspect.signature(LOSSES[name].function).parameters)[2:]
    return {key: SETTINGS[key] for key in taken}


def of_delta(form):
    """A closed form of beta times the difference of log ratios."""
    return [form(BETA * delta) for delta in DELTAS]


def of_rewards(form):
    """A closed form of the rewards of chosen and rejected."""
    return [form(BETA * chosen, BETA * rejected) for chosen, rejected in zip(*RATIOS, strict=True)]


def noisy(z, e=0.1):
    return -(1 - e) * math.log(sigma(z)) - e * math.log(sigma(-z))


def of_odds():
    """ORPO's equation 7 with the mean probability of a token."""
    values = []
    for chosen, rejected in zip(MEANS.chosen.tolist(), MEANS.rejected.tolist(), strict=True):
        p, q = math.exp(chosen), math.exp(rejected)
        ratio = (p / (1 - p)) / (q / (1 - q))
        values.append(-BETA * math.log(sigma(math.log(ratio))))
    return values


def kto_form():
    """The baseline is the mean of the second completions' r, which is -0.5: so 0."""
    good = [0.7 * (1 - sigma(BETA * r)) for r in RATIOS[0]]
    bad = [1.2 * (1 - sigma(-BETA * r)) for r in RATIOS[0]]
    return [good[0], bad[1], good[2]]


FORMS = {
    "dpo": of_delta(lambda z: -math.log(sigma(z))),
    "ipo": [(delta - 1 / (2 * BETA)) ** 2 for delta in DELTAS],
    "hinge": of_delta(lambda z: max(0.0, 1 - z)),
    "robust": of_delta(lambda z: (-0.9 * math.log(sigma(z)) + 0.1 * math.log(sigma(-z))) / 0.8),
    "cdpo": of_delta(noisy),
    "exo_pair": of_delta(
        lambda z: sigma(z) * math.log(sigma(z) / 0.9) + sigma(-z) * math.log(sigma(-z) / 0.1)
    ),
    "nca_pair": of_rewards(
        lambda w, v: -math.log(sigma(w)) - (math.log(sigma(-w)) + math.log(sigma(-v))) / 2
    ),
    "bco_pair": of_rewards(lambda w, v: -math.log(sigma(w)) - math.log(sigma(-v))),
    "sppo_hard": [(w - 1.0) ** 2 + (v + 1.0) ** 2 for w, v in zip(*RATIOS, strict=True)],
    # sorted: policy -2, 1, 6 less reference -0.5, -0.5, 3.5
    "aot": [noisy(BETA * delta) for delta in (-1.5, 1.5, 2.5)],
    # sorted: chosen -0.5, 0.5, 1 less rejected -2, -0.5, 1
    "aot_unpaired": [noisy(BETA * delta) for delta in (1.5, 1.0, 0.0)],
    "apo_zero": of_rewards(lambda w, v: 1 - sigma(w) + sigma(v)),
    "apo_down": of_rewards(lambda w, v: sigma(w) + 1 - sigma(w - v)),
    "discopop": of_delta(
        lambda z: (
            -math.log(sigma(z)) * (1 - sigma(z / 0.05)) + math.exp(-z) * sigma(z / 0.05)
        )
    ),
    "sigmoid_norm": of_delta(lambda z: -math.log(sigma(z))),
    "simpo": [noisy(BETA * delta - 0.3) for delta in (0.5, -0.9, 1.2)],
    "cpo": [noisy(BETA * delta) for delta in (0.5, -0.9, 1.2)],
    "orpo": of_odds(),
    "kto": kto_form(),
}  # fmt: skip


def inputs_of(name):
    return (MEANS, ZERO) if LOSSES[name].free else (POLICY, REFERENCE)


@pytest.mark.parametrize("name", LOSSES)
def test_closed_form(name):
    """The paper's equation at hand-computed points."""
    each = LOSSES[name].function(*inputs_of(name), **arguments_of(name))
    np.testing.assert_allclose(each, FORMS[name], rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope(name):
    """By central differences, in every log-probability of the policy. KTO's baseline is a constant to it."""
    policy, reference = inputs_of(name)
    arguments = arguments_of(name)
    moved = 1 if name == "kto" else 2

    def total(*parts):
        whole = Pair(*(*parts, *policy[len(parts) :]))
        return jnp.sum(LOSSES[name].function(whole, reference, **arguments))

    gradient = jax.grad(total, argnums=tuple(range(moved)))(*policy[:moved])
    step = 1e-2
    for side in range(moved):
        for place in range(3):
            push = jnp.zeros(3).at[place].set(step)
            ends = [
                total(
                    *(
                        part + sign * float(at == side) * push
                        for at, part in enumerate(policy[:moved])
                    )
                )
                for sign in (1.0, -1.0)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient[side][place], slope, atol=3e-3)


@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        ("reverse_kl", math.log),
        ("forward_kl", lambda u: 1 - 1 / u),
        ("js", lambda u: math.log(2 * u / (1 + u))),
        ("alpha", lambda u: (u ** (0.3 - 1) - 1) / (0.3 - 1)),
    ],
)
def test_f_divergences(name, derivative):
    """f'(u) of u = pi / pi_ref, and its mean over tokens."""
    lengths = Pair(jnp.asarray([2.0, 4.0, 5.0]), jnp.asarray([1.0, 2.0, 10.0]))
    found = losses.scores(POLICY, REFERENCE, None, name, 0.3)
    means = losses.scores(POLICY, REFERENCE, lengths, name, 0.3)
    for side in range(2):
        wanted = np.asarray([derivative(math.exp(r)) for r in RATIOS[side]])
        np.testing.assert_allclose(found[side], wanted, rtol=1e-5)
        np.testing.assert_allclose(means[side], wanted / np.asarray(lengths[side]), rtol=1e-5)


def test_absent_places_take_no_part_in_sorting():
    """AOT of two pairs and an empty place is AOT of the two."""
    present = jnp.asarray([1.0, 0.0, 1.0])
    kept = jnp.asarray([0, 2])
    few = [jax.tree.map(lambda x: x[kept], pair) for pair in (POLICY, REFERENCE)]
    for loss in (losses.aot, losses.aot_unpaired):
        settings = {"beta": BETA, "label_smoothing": 0.1}
        whole = loss(POLICY, REFERENCE, present=present, **settings)
        np.testing.assert_allclose(
            whole[:2], loss(*few, present=jnp.ones(2), **settings), rtol=1e-6
        )
        assert whole[2] == 0.0


def test_orpo_is_finite_at_certainty_and_far_from_it():
    """log(1 - p) neither overflows where p is 1 nor cancels where it is small."""
    for mean in (0.0, -1e-8, -50.0):
        pair = Pair(jnp.asarray([mean]), jnp.asarray([-1.0]))
        value, slope = jax.value_and_grad(lambda pair: losses.orpo(pair, pair, beta=0.1).sum())(
            pair
        )
        assert np.isfinite(value)
        assert np.isfinite(slope.chosen).all()
