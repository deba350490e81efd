"""How far a folder is from what it was made of, as loss and next tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxft.formats.measure import Measured, measure, report
from jaxft.formats.own_text import Text


def test_loss_and_choices_are_those_of_the_logits(model_of, logits_of):
    model, params = model_of("llama")
    random = np.random.default_rng(0)
    pieces = []
    for length in (5, 9):
        ids = random.integers(0, model.config.vocabulary, length).astype(np.int32)
        pieces.append((ids, np.arange(length) >= 3))
    found = measure(model, params, Text("text", pieces))
    losses, choices = [], []
    for ids, targets in pieces:
        logits = logits_of(model, params, ids[None])[0]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        places = np.flatnonzero(targets)
        losses += [-log_p[at - 1, ids[at]] for at in places]
        choices += [int(logits[at - 1].argmax()) for at in places]
    assert found.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert found.choices.tolist() == choices
    np.testing.assert_allclose(
        found.logits[0], logits_of(model, params, pieces[0][0][None])[0, 0], rtol=1e-4
    )


def told(capsys, change, same, stored="bfloat16", random=False):
    choices = np.arange(100)
    before = Measured(2.0, choices, np.ones((2, 3)))
    after = Measured(2.0 + change, np.where(choices < same, choices, -1), np.full((2, 3), 1.5))
    assert report("merged", after, before, Text("English", [], random), stored) == 0.5
    return capsys.readouterr().out.splitlines()


def test_what_changed_and_what_is_usual_is_said(capsys):
    first, second = told(capsys, 0.001, 99)
    assert first == (
        "merged: on 100 tokens of English the loss is 2.0010, and 2.0000 before (+0.0010); 99 % of the next tokens "
        "stay the same"
    )
    assert second.startswith("  usual for bfloat16: a change below ")
    assert second.endswith(" or more the same.")


@pytest.mark.parametrize(("change", "same"), [(0.5, 100), (-0.5, 100), (0.0, 20), (np.nan, 100)])
def test_what_is_more_than_usual_is_said_with_what_helps(capsys, change, same):
    assert told(capsys, change, same)[1].endswith(
        "This is more: --dtype float32 keeps what was trained."
    )
    assert "int8" in told(capsys, change, same, stored="nf4")[1]


def test_of_random_tokens_nothing_is_usual(capsys):
    assert len(told(capsys, 0.5, 3, random=True)) == 1
