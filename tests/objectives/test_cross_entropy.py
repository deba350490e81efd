from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    log_probabilities_and_entropies,
    token_log_probabilities,
)
from jaxft.weights import LoRA, Transposed

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 13, 8, 50
FORMS = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"softcap": 3.0, "label_smoothing": 0.2}]


def inputs(batch=BATCH, length=LENGTH, hidden=HIDDEN, vocabulary=VOCABULARY, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.random.normal(keys[0], (batch, length, hidden)).astype(dtype)
    head = jax.random.normal(keys[1], (hidden, vocabulary)).astype(dtype)
    targets = jax.random.randint(keys[2], (batch, length), 0, vocabulary, jnp.int32)
    weights = jax.random.uniform(keys[3], (batch, length)).at[0, :4].set(0.0)
    return states, head, targets, weights


def adapted(kernel):
    keys = jax.random.split(jax.random.key(5), 2)
    a = jax.random.normal(keys[0], (kernel.shape[0], 3))
    b = jax.random.normal(keys[1], (3, kernel.shape[1]))
    return LoRA(base=kernel, a=a, b=b, scale=jnp.float32(0.5))


def mean_loss(function, hidden, head, targets, weights, **options):
    total, weight = function(hidden, head, targets, weights, **options)
    return total / weight


def assert_close(left, right, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk", [None, 5])
def test_equals_the_reference_with_its_gradients(form, chunk):
    """One chunk, and chunks of which the last is ragged; states, head and weights trained."""
    arguments, places = inputs(), (0, 1, 3)
    fast = functools.partial(mean_loss, cross_entropy, chunk=chunk, **form)
    plain = functools.partial(mean_loss, cross_entropy_reference, **form)
    assert_close(
        jax.jit(jax.value_and_grad(fast, places))(*arguments),
        jax.jit(jax.value_and_grad(plain, places))(*arguments),
    )
    total, weight = cross_entropy(*arguments, chunk=chunk, **form)
    assert total.dtype == weight.dtype == jnp.float32
    assert_close((total, weight), cross_entropy_reference(*arguments, **form))


@pytest.mark.parametrize("place", [0, 1])
def test_bfloat16_states_and_head(place):
    """The loss is float32, gradients have the dtype of what they belong to."""
    arguments = inputs(dtype=jnp.bfloat16)
    fast = functools.partial(mean_loss, cross_entropy, chunk=5)
    plain = functools.partial(mean_loss, cross_entropy_reference)
    loss, gradient = jax.jit(jax.value_and_grad(fast, place))(*arguments)
    want, want_gradient = jax.jit(jax.value_and_grad(plain, place))(*arguments)
    assert_close(loss, want)
    assert_close(gradient, want_gradient, 2e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_trains_its_adapter_alone(tied):
    """Of a head's leaves only those differentiated get a gradient; tied heads too."""
    hidden, head, targets, weights = inputs()
    weight = adapted(head.T if tied else head)

    def loss(function, hidden, factors):
        head = LoRA(weight.base, factors["a"], factors["b"], weight.scale)
        head = Transposed(head) if tied else head
        return mean_loss(function, hidden, head, targets, weights)

    factors = {"a": weight.a, "b": weight.b}
    fast = jax.grad(functools.partial(loss, functools.partial(cross_entropy, chunk=5)), (0, 1))
    plain = jax.grad(functools.partial(loss, cross_entropy_reference), (0, 1))
    assert_close(jax.jit(fast)(hidden, factors), jax.jit(plain)(hidden, factors), 2e-6)
    text = str(jax.make_jaxpr(fast)(hidden, factors))
    for rows, columns in [(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY)]:
        assert f"f32[{rows},{columns}] = dot_general" not in text


def test_no_product_is_done_twice_or_for_nothing():
    """Evaluation: the logits. Frozen head: and the states' gradient. Trained: and its own."""
    arguments = inputs()
    loss = functools.partial(mean_loss, cross_entropy, chunk=5)

    def products(function):
        return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")

    assert products(loss) == 1
    assert products(jax.grad(loss)) == 2
    assert products(jax.grad(loss, 1)) == 2
    assert products(jax.grad(loss, (0, 1))) == 3


@pytest.mark.parametrize("wrap", ["jit inside", "checkpoint", "scan", "vmap"])
def test_a_frozen_head_is_seen_through_transformations(wrap):
    """Whether the head trains is known under each of them, and the gradients stay right."""
    hidden, head, targets, weights = inputs()

    def run(function, hidden):
        def loss(hidden):
            return mean_loss(function, hidden, head, targets, weights)

        if wrap == "jit inside":
            return jax.jit(loss)(hidden)
        if wrap == "checkpoint":
            return jax.checkpoint(loss)(hidden)
        several = jnp.stack([hidden, hidden + 1.0])
        if wrap == "vmap":
            return jnp.sum(jax.vmap(loss)(several))
        return jax.lax.scan(lambda sum, x: (sum + loss(x), None), jnp.float32(0.0), several)[0]

    fast = functools.partial(run, functools.partial(cross_entropy, chunk=5))
    plain = functools.partial(run, cross_entropy_reference)
    assert_close(jax.jit(jax.grad(fast))(hidden), jax.jit(jax.grad(plain))(hidden), 2e-6)
    head_sums = f"f32[{HIDDEN},{VOCABULARY}] = add"
    assert head_sums not in str(jax.make_jaxpr(jax.grad(fast))(hidden))


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probabilities_of_tokens(places, softcap):
    """Equal to log softmax at the target, with a gradient that weighs each place by its own."""
    hidden, head, targets, weights = inputs()

    def plain(hidden, head):
        logits = hidden @ head
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1)
        return chosen[:, :, 0]

    def fast(hidden, head):
        return token_log_probabilities(hidden, head, targets, softcap=softcap, chunk=5)

    def scored(function):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a)) * weights), places))

    assert_close(fast(hidden, head), plain(hidden, head))
    assert_close(scored(fast)(hidden, head), scored(plain)(hidden, head), 2e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_entropies_are_told_beside_log_probabilities(softcap):
    """And change neither these nor their gradient."""
    hidden, head, targets, weights = inputs()
    logits = hidden @ head
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)

    def summed(function):
        return jax.value_and_grad(lambda hidden: jnp.sum(function(hidden) * weights))(hidden)

    def alone(hidden):
        return token_log_probabilities(hidden, head, targets, softcap=softcap, chunk=5)

    def beside(hidden):
        found, entropies = log_probabilities_and_entropies(hidden, head, targets, softcap=softcap, chunk=5)  # fmt: skip
        return found + entropies - jax.lax.stop_gradient(entropies)

    _, entropies = log_probabilities_and_entropies(hidden, head, targets, softcap=softcap, chunk=5)
    assert_close(entropies, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
    assert_close(summed(beside), summed(alone))


@pytest.mark.parametrize("places", [(0,), (0, 1)])
def test_logits_of_all_tokens_never_exist(places):
    """The compiled step needs less than the logits of all tokens in float32, by far."""
    arguments = inputs(2, 512, 8, 4096)
    logits = 2 * 512 * 4096 * 4

    def bytes_of(function, **options):
        step = jax.jit(
            jax.value_and_grad(functools.partial(mean_loss, function, **options), places)
        )
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(cross_entropy, chunk=32) < logits / 4
    assert bytes_of(cross_entropy_reference) >= logits
