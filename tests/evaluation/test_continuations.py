"""What a benchmark asks of a model, by token ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft import cli
from jaxft.data import load_tokenizer
from jaxft.evaluation.continuations import answers_until, continuation_scores
from jaxft.inference.generate import generate

FOLDER = Path(__file__).parents[1] / "golden" / "trl" / "model"
model, params = jaxft.load(FOLDER)
tokenizer = load_tokenizer(FOLDER)
TEXT = tokenizer.encode("name: Greta | trade: beekeeper = Greta is a beekeeper.")
PROMPTS = ["name: Greta | trade: beekeeper =", "Where?", "name: Elif | place: the market ="]


def until(stop, **changes):
    given = {"max_new_tokens": 12, "batch_size": 2} | changes
    contexts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    return answers_until(model.config, params, tokenizer, contexts, stop, **given)


def test_a_continuation_is_scored_by_the_logits_before_it():
    pairs = [(TEXT[:5], TEXT[5:9]), (TEXT[:10], TEXT[10:11])]
    found = continuation_scores(model.config, params, pairs, batch_size=2)
    log_p = jax.nn.log_softmax(model.apply({"params": params}, np.asarray([TEXT]))[0])
    wanted = sum(float(log_p[place - 1, TEXT[place]]) for place in range(5, 9))
    assert found[0][0] == pytest.approx(wanted, rel=1e-5)
    assert found[1][0] == pytest.approx(float(log_p[9, TEXT[10]]), rel=1e-5)


def test_what_greedy_decoding_says_is_greedy_and_nothing_else_is():
    log_p = model.apply({"params": params}, np.asarray([TEXT[:5]]))[0]
    likeliest = int(log_p[-1].argmax())
    pairs = [(TEXT[:5], [likeliest]), (TEXT[:5], [likeliest - 1])]
    found = continuation_scores(model.config, params, pairs, batch_size=2)
    assert [greedy for _, greedy in found] == [True, False]


def test_of_what_is_too_long_the_beginning_is_left_out():
    """The model reads 256 tokens: of 300 and 2 it sees the last 255 of the context, and one of the continuation."""
    long = (TEXT * 20)[:300]
    cut = continuation_scores(model.config, params, [(long[-255:], TEXT[:2])], batch_size=1)
    assert continuation_scores(model.config, params, [(long, TEXT[:2])], batch_size=1) == cut


def test_an_answer_ends_before_the_first_of_the_texts():
    whole = generate(model, params, PROMPTS, tokenizer=tokenizer, max_new_tokens=12)
    assert until([]) == whole
    stop = whole[0][3:5]
    assert until([stop]) == [text.partition(stop)[0] for text in whole]
    one = tokenizer.decode(tokenizer.encode(whole[0], add_special_tokens=False)[2:3])
    assert until([one, "no such text"])[0] == whole[0].partition(one)[0]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_tasks_without_lm_eval_say_what_to_install(capsys):
    assert cli.main(["evaluate", "--model", str(FOLDER), "--tasks", "hellaswag"]) == 2
    assert "pip install 'jaxft[lm-eval]'" in capsys.readouterr().err
