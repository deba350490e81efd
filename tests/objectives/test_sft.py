"""Losses that never form the logits are those of the logits, where a family scales and caps them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import Config, Transformer
from jaxft.models.transformer import initial_params
from jaxft.objectives.pairs import position_log_probabilities
from jaxft.objectives.sft import sft

SCALED = {"granite": {"logit_scale": 0.3}, "cohere2": {"logit_scale": 0.0625}}
CAPPED = {"gemma2": {"logit_softcap": 2.0}}


@pytest.mark.parametrize("settings", [*SCALED.values(), *CAPPED.values()], ids=str)
def test_the_loss_is_of_the_models_own_logits(settings: dict[str, float]) -> None:
    config = Config(
        family="llama", vocabulary=11, hidden=8, intermediate=12, layers=1, heads=2, key_heads=1,
        head_dim=4, max_length=16, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    params = initial_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocabulary)
    segments, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    batch |= {"weights": jnp.ones(tokens.shape), "branches": jnp.zeros_like(tokens)}
    scores = Transformer(config).apply({"params": params}, tokens)
    expected = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(scores, axis=-1))[:, :-1], np.asarray(tokens)[:, 1:, None], -1
    )[..., 0]
    total, _ = sft(
        config, params, {**batch, "weights": jnp.ones(tokens.shape)}, label_smoothing=0.0
    )
    np.testing.assert_allclose(total, -expected.sum(), rtol=1e-5)
    pairs = {"pairs": jnp.zeros_like(tokens)}
    found, _ = position_log_probabilities(config, params, {**batch, **pairs})
    np.testing.assert_allclose(np.asarray(found)[:, :-1], expected, atol=1e-5)
