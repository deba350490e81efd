from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jaxft
from jaxft.models import Config, Transformer, hidden_states, logits
from jaxft.models.config import Rotary
from jaxft.models.transformer import (
    cached_hidden_states,
    empty_cache,
    initial_params,
    positions_of,
)
from jaxft.planning.flops import count_flops
from jaxft.tree import flatten_with_paths, map_with_paths

SIZES = {
    "vocabulary": 24,
    "hidden": 16,
    "intermediate": 20,
    "layers": 2,
    "heads": 4,
    "key_heads": 2,
    "head_dim": 4,
    "max_length": 32,
    "query_scale": 0.5,
}
CONFIGS = {
    "llama": Config(family="llama", **SIZES),
    "qwen2": Config(family="qwen2", attention_bias=True, tied=True, **SIZES),
    "gemma2": Config(
        family="gemma2",
        norm_offset=1.0,
        norm_place="both",
        activation="gelu_tanh",
        attention_softcap=5.0,
        logit_softcap=4.0,
        windows=(3, 0),
        embedding_scale=4.0,
        tied=True,
        **SIZES,
    ),
    "gpt2": Config(
        family="gpt2",
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv=True,
        positions="learned",
        tied=True,
        **SIZES | {"key_heads": 4},
    ),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 24)


@functools.cache
def params_of(config):
    """A decoder whose norms and biases are off their trivial values and whose kernels matter."""

    def move(path, leaf):
        noise = jax.random.normal(jax.random.key(len(path)), leaf.shape)
        return leaf * 5.0 if path.endswith(("kernel", "embedding")) else leaf + 0.2 * noise

    return jax.jit(lambda key: map_with_paths(move, initial_params(config, key)))(jax.random.key(0))


def run(config, params, tokens, segments=None, positions=None):
    return jax.jit(Transformer(config).apply)({"params": params}, tokens, segments, positions)


def shapes_of(tree):
    return {path: leaf.shape for path, leaf in flatten_with_paths(tree)}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def with_layers(config, layers):
    windows = (config.windows * layers)[:layers]
    return dataclasses.replace(config, layers=layers, windows=windows)


def test_the_model_initialises_itself(config):
    params = Transformer(config).init(jax.random.key(0), TOKENS)["params"]
    expected = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    assert shapes_of(params) == shapes_of(expected)
    scores = run(config, params, TOKENS)
    assert scores.shape == (2, 9, 24)
    assert scores.dtype == jnp.float32


def test_no_logit_depends_on_a_later_token(config):
    """The gradient of the logits at a place with respect to later embedded tokens is exactly zero."""
    params = params_of(config)
    place = 4

    def of_place(embedded):
        rows = params | {"embed": {"embedding": embedded}}
        head = {"head": {"kernel": jnp.ones((16, 24))}}  # the tied head would read the rows as well
        ids = jnp.arange(9, dtype=jnp.int32)[None]
        return jnp.sum(run(config, rows | head, ids)[0, place] ** 2)

    slope = jax.grad(of_place)(params["embed"]["embedding"])
    reached = np.asarray(jnp.any(slope != 0.0, axis=-1))[:9]
    np.testing.assert_array_equal(reached, [True] * (place + 1) + [False] * (8 - place))


def test_packed_segments_equal_separate_rows(config):
    params = params_of(config)
    first, second = TOKENS[:1, :5], TOKENS[1:, :4]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    scores = run(config, params, packed, segments)
    np.testing.assert_allclose(scores[:, :5], run(config, params, first), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[:, 5:9], run(config, params, second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_tokens_logits(config, side):
    params = params_of(config)
    width = ((0, 0), (3, 0) if side == "left" else (0, 3))
    padded = jnp.pad(TOKENS, width, constant_values=7)
    mask = jnp.pad(jnp.ones_like(TOKENS), width)
    scores = run(config, params, padded, mask)
    real = scores[:, 3:] if side == "left" else scores[:, :-3]
    np.testing.assert_allclose(real, run(config, params, TOKENS), rtol=1e-4, atol=1e-5)


def test_positions_count_from_the_start_of_each_segment():
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 3, 3, 3]], jnp.int32)
    np.testing.assert_array_equal(
        positions_of(segments), [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0, 1, 2]]
    )


def test_a_window_hides_what_lies_before_it():
    config = dataclasses.replace(CONFIGS["llama"], windows=(3, 3))
    params = params_of(config)
    changed = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 24)
    before, after = run(config, params, TOKENS), run(config, params, changed)
    np.testing.assert_array_equal(
        before[:, 5:], after[:, 5:]
    )  # two layers see 2 places further each
    assert not np.allclose(before[:, 4], after[:, 4])
    alternating = dataclasses.replace(config, windows=(3, 0))
    assert not np.allclose(
        run(alternating, params, TOKENS)[:, 8], run(alternating, params, changed)[:, 8]
    )


def test_a_window_as_long_as_the_row_hides_nothing():
    params = params_of(CONFIGS["llama"])
    wide = dataclasses.replace(CONFIGS["llama"], windows=(9, 0))
    np.testing.assert_allclose(
        run(wide, params, TOKENS), run(CONFIGS["llama"], params, TOKENS), rtol=1e-5, atol=1e-6
    )


def test_the_soft_caps_bite():
    config = CONFIGS["gemma2"]
    params = params_of(config)
    scores = run(config, params, TOKENS)
    assert float(jnp.max(jnp.abs(scores))) < config.logit_softcap
    uncapped = run(dataclasses.replace(config, logit_softcap=None), params, TOKENS)
    np.testing.assert_allclose(scores, 4.0 * jnp.tanh(uncapped / 4.0), rtol=1e-4, atol=1e-5)
    flat = run(dataclasses.replace(config, attention_softcap=1e-3), params, TOKENS)
    assert not np.allclose(scores, flat, atol=1e-3)


def test_the_program_does_not_grow_with_depth(config):
    """Per-layer ranks included: two layers and eight trace to the same number of lines."""

    def lines(layers):
        deep = with_layers(config, layers)
        method = jaxft.methods.dora(rank=3, rank_pattern={r".*\.1\..*proj": 1})

        def fresh():
            return jaxft.adapt(initial_params(deep, jax.random.key(0)), method, jax.random.key(1))

        def loss(trainable, frozen):
            params = jaxft.combine(trainable, frozen)
            return jnp.sum(Transformer(deep).apply({"params": params}, TOKENS))

        trainable, frozen = jaxft.partition(jax.eval_shape(fresh), method)
        return len(str(jax.make_jaxpr(jax.grad(loss))(trainable, frozen)).splitlines())

    assert lines(2) == lines(8)


def training_loss(config, method, tokens=TOKENS):
    """(a loss of the trainable leaves, these) of an adapted decoder."""
    params = jaxft.adapt(params_of(config), method, jax.random.key(1))
    trainable, frozen = jaxft.partition(params, method)

    def loss(trainable):
        params = jaxft.combine(trainable, frozen)
        return jnp.mean(Transformer(config).apply({"params": params}, tokens) ** 2)

    return loss, trainable


def compiled_gradient(config, method, tokens):
    """The compiled gradient of `training_loss`, and its temporaries in bytes."""
    loss, trainable = training_loss(config, method, tokens)
    compiled = jax.jit(jax.grad(loss)).lower(trainable).compile()
    return compiled, trainable, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.thorough)])
def test_remat_changes_memory_and_no_gradient(family):
    config, method = CONFIGS[family], jaxft.methods.lora(rank=2)
    deep = with_layers(config, 24)  # so deep that what a layer keeps outweighs its working set
    tokens = jnp.tile(TOKENS, (4, 2))
    memory, gradients = {}, {}
    for remat in ("none", "dots", "outputs", "full"):
        rematerialized = dataclasses.replace(deep, remat=remat)
        compiled, trainable, memory[remat] = compiled_gradient(rematerialized, method, tokens)
        gradients[remat] = compiled(trainable)
    for remat in ("dots", "outputs", "full"):
        for found, expected in zip(
            jax.tree.leaves(gradients[remat]), jax.tree.leaves(gradients["none"]), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # Without remat the decoder keeps little more than its products, so that dots comes close to it.
    assert memory["full"] < memory["outputs"] < memory["dots"] < 1.05 * memory["none"]
    assert memory["full"] < 0.7 * memory["none"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dots_makes_no_product_of_a_frozen_kernel_again(family):
    """DoRA's magnitude learns from the very output that is kept: its base is multiplied as often as LoRA's."""
    config = dataclasses.replace(CONFIGS[family], remat="dots")

    def flops(method):
        loss, trainable = training_loss(config, method(rank=1))
        return count_flops(jax.make_jaxpr(jax.grad(loss))(trainable))

    kernels = jax.tree.leaves(params_of(config)["layers"])
    once = 2 * TOKENS.size * sum(kernel.size for kernel in kernels if kernel.ndim == 3)
    # What is left between them are products with a and b, whose rank is 1.
    assert flops(jaxft.methods.dora) - flops(jaxft.methods.lora) < once / 4


def results(primitive, jaxpr):
    """The shapes of all that a primitive gives in a program, those in its loops' bodies included."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitive:
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from results(primitive, inner)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_norms_of_a_kernels_columns_are_computed_once(remat):
    """However much else is computed again: they read and change the whole kernel, and are a number a column."""
    config = dataclasses.replace(CONFIGS["llama"], remat=remat)
    loss, trainable = training_loss(config, jaxft.methods.dora(rank=1))
    roots = results(jax.lax.sqrt_p, jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)
    assert len(list(roots)) == len(("q", "k", "v", "o", "gate", "up", "down"))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_dora_keeps_each_product_once(remat):
    """Beside what LoRA keeps: none of what the gated product keeps anyway, gate and up."""
    config = with_layers(CONFIGS["llama"], 24)
    config = dataclasses.replace(config, intermediate=160, remat=remat)
    tokens = jnp.tile(TOKENS, (4, 2))

    def temporaries(method):
        return compiled_gradient(config, method(rank=2), tokens)[-1]

    gate_and_up = 24 * tokens.size * 2 * config.intermediate * 4
    assert temporaries(jaxft.methods.dora) - temporaries(jaxft.methods.lora) < gate_and_up / 2


def test_it_runs_in_bfloat16(config):
    narrow = dataclasses.replace(config, dtype="bfloat16")
    params = params_of(config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert hidden_states(narrow, half, TOKENS).dtype == jnp.bfloat16
    scores = run(narrow, half, TOKENS)
    assert scores.dtype == jnp.float32
    expected = run(config, params, TOKENS)
    largest = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(scores, expected, atol=0.06 * largest)


def test_float32_parameters_compute_in_bfloat16(config):
    narrow = dataclasses.replace(config, dtype="bfloat16")
    assert (
        jax.eval_shape(lambda: hidden_states(narrow, params_of(config), TOKENS)).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("pad", [0, 2])
def test_decoding_from_a_cache_equals_the_whole(config, pad):
    """A prompt at once, padded on the left, then token by token."""
    params = params_of(config)
    tokens = jnp.pad(TOKENS, ((0, 0), (pad, 0)))
    segments = jnp.pad(jnp.ones_like(TOKENS), ((0, 0), (pad, 0)))
    positions = positions_of(segments)
    expected = run(config, params, tokens, segments, positions)

    @jax.jit
    def advance(tokens, segments, positions, cache, index):
        hidden, cache = cached_hidden_states(
            config, params, tokens, segments, positions, cache, index
        )
        return logits(config, params, hidden), cache

    cache, scores = empty_cache(config, 2, 14), []
    for start, stop in [(0, pad + 4), *((place, place + 1) for place in range(pad + 4, pad + 9))]:
        part = (array[:, start:stop] for array in (tokens, segments, positions))
        score, cache = advance(*part, cache, jnp.asarray(start, jnp.int32))
        scores.append(score)
    found = jnp.concatenate(scores, axis=1)
    np.testing.assert_allclose(found[:, pad:], expected[:, pad:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("dora", ("*_proj", "embed/embedding", "head")), ("vera", ("*_proj",))],
)
def test_an_adapted_decoder_equals_the_merged_one(config, name, targets):
    method = jaxft.methods.METHODS[name](rank=2, targets=targets)
    params = jaxft.adapt(params_of(config), method, jax.random.key(1))
    trainable, frozen = jaxft.partition(params, method)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), trainable
    )
    params = jaxft.combine(moved, frozen)
    found, expected = run(config, params, TOKENS), run(config, jaxft.merge(params), TOKENS)
    largest = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * largest)


def test_no_gradient_of_a_frozen_kernel_is_computed():
    config = CONFIGS["llama"]

    def kernel_shaped(method):
        params = jaxft.adapt(params_of(config), method, jax.random.key(1))
        trainable, frozen = jaxft.partition(params, method)

        def loss(trainable):
            params = jaxft.combine(trainable, frozen)
            return jnp.sum(Transformer(config).apply({"params": params}, TOKENS))

        kernels = {
            leaf.shape[-2:]
            for path, leaf in flatten_with_paths(params_of(config))
            if "kernel" in path
        }
        jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr
        shapes = set(results(jax.lax.dot_general_p, jaxpr))
        return shapes & (kernels | {shape[::-1] for shape in kernels})

    assert kernel_shaped(jaxft.methods.full())
    assert not kernel_shaped(jaxft.methods.lora(rank=2))
    assert not kernel_shaped(jaxft.methods.lora_fa(rank=2))


def stretched(kind, **more):
    """Two layers of which the first is turned, and not the second."""
    first = Rotary(100.0, tuple(sorted({"rope_type": kind, **more}.items())))
    return dataclasses.replace(CONFIGS["llama"], rotaries=(first, None))


def test_longrope_of_some_layers_changes_its_angles_behind_the_original_length():
    """With factors that are all alike it is the plain rotary up to there, and the linear one behind it."""
    params = initial_params(CONFIGS["llama"], jax.random.key(0))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    longrope = stretched(
        "longrope",
        short_factor=(1.0, 1.0),
        long_factor=(4.0, 4.0),
        attention_factor=1.0,
        original_max_position_embeddings=8,
    )
    for length, same in ((8, stretched("default")), (12, stretched("linear", factor=4.0))):
        found, expected = (
            hidden_states(one, params, tokens[:, :length]) for one in (longrope, same)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    cache, places = empty_cache(longrope, 1, 12), (jnp.ones_like(tokens), tokens)
    again, _ = cached_hidden_states(longrope, params, tokens, *places, cache, jnp.int32(0))
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)
