"""A model's figures on rows: what is scored, what is not, and that nothing else has a say in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft.data import Row, load_tokenizer
from jaxft.errors import UserError
from jaxft.evaluation.asking import with_passages
from jaxft.evaluation.items import items_of
from jaxft.evaluation.likelihood import likelihoods
from jaxft.evaluation.reading import read_items
from jaxft.inference.asked import Asked
from jaxft.inference.generate import generate
from jaxft.training.sharding import make_mesh, shardings

FOLDER = Path(__file__).parents[1] / "golden" / "trl" / "model"
ROWS = [
    {"prompt": "name: Greta | trade: beekeeper =", "completion": " Greta is a beekeeper."},
    {"prompt": "name: Elif | place: the market =", "completion": " Elif works at the market."},
    {"prompt": "Where?", "completion": " Here, at the harbour, with all of the others."},
    {"prompt": "name: Omar =", "completion": " Omar."},
    {"prompt": "Where?", "completion": " There."},
]
model, params = jaxft.load(FOLDER)
tokenizer = load_tokenizer(FOLDER)
apply = jax.jit(model.apply)


def evaluate(rows=ROWS, metrics=("loss", "token_accuracy"), **changes):
    given = {"tokenizer": tokenizer, "max_new_tokens": 6, "batch_size": 2}
    return jaxft.evaluate(model, params, rows, metrics, **given | changes)


def values(result):
    return {name: found.value for name, found in result.metrics.items()}


def by_definition(row):
    """(sum of -log p, tokens, hits) of a row's completion, from the logits of the row alone."""
    prompt = tokenizer.encode(row["prompt"])
    whole = tokenizer.encode(row["prompt"] + row["completion"] + tokenizer.eos_text)
    padded = np.pad(np.asarray([whole]), ((0, 0), (0, 64 - len(whole))))  # what follows is not seen
    logits = np.asarray(apply({"params": params}, padded)[0])
    log_p = jax.nn.log_softmax(logits)
    start = len(prompt)
    found = [float(log_p[place - 1, whole[place]]) for place in range(start, len(whole))]
    hits = [int(logits[place - 1].argmax()) == whole[place] for place in range(start, len(whole))]
    return -sum(found), len(found), sum(hits)


def test_loss_and_token_accuracy_are_those_of_the_logits():
    each = np.asarray([by_definition(row) for row in ROWS])
    total = each.sum(axis=0)
    found = evaluate()
    assert values(found) == pytest.approx(
        {"loss": total[0] / total[1], "token_accuracy": total[2] / total[1]}, rel=1e-5
    )
    assert [record["tokens"]["scored"] for record in found.records] == [
        each[0, 1], each[1, 1], each[2, 1] + each[4, 1], each[3, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 5}, {"packing": True}])
def test_batches_and_packing_have_no_say(changes):
    plain, other = evaluate(), evaluate(**changes)
    for one, two in zip(plain.records, other.records, strict=True):
        assert one["scores"] == pytest.approx(two["scores"], rel=1e-5)


def test_the_mesh_has_no_say():
    metrics = ("loss", "exact")
    plain = evaluate(metrics=metrics)
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 1, "tensor": 1})
    laid = jax.device_put(params, shardings(params, mesh))
    with jax.set_mesh(mesh):
        spread = jaxft.evaluate(
            model, laid, ROWS, metrics, tokenizer=tokenizer, max_new_tokens=6, batch_size=4
        )
    assert values(spread) == pytest.approx(values(plain), rel=1e-5)
    for one, two in zip(plain.records, spread.records, strict=True):
        assert one["answer"] == two["answer"]


def test_answers_are_generates_and_stand_in_the_records():
    found = evaluate(metrics=("exact", "f1"))
    prompts = list(dict.fromkeys(row["prompt"] for row in ROWS))
    said = generate(model, params, prompts, tokenizer=tokenizer, max_new_tokens=6)
    assert [record["answer"] for record in found.records] == said
    first = found.records[0]
    assert (first["origin"], first["prompt"]) == ("row 1", ROWS[0]["prompt"])
    assert first["tokens"]["prompt"] == len(tokenizer.encode(ROWS[0]["prompt"]))
    assert first["tokens"]["answer"] <= 6
    assert set(first["scores"]) == {"exact", "f1"}
    json.dumps(found.records)


def test_rows_that_ask_the_same_are_one_item_with_several_references():
    found = evaluate(metrics=("exact",)).records
    assert found[2]["references"] == [ROWS[2]["completion"], ROWS[4]["completion"]]
    assert len(found) == 4


def test_a_model_that_says_the_reference_is_exact():
    said = generate(model, params, ["Where?"], tokenizer=tokenizer, max_new_tokens=6)[0]
    rows = [{"prompt": "Where?", "completion": said}, {"prompt": "Who?", "completion": "Nobody"}]
    assert values(evaluate(rows, ("exact",))) == {"exact": 0.5}


def test_what_cannot_be_scored_is_named_with_its_reason():
    long = "word " * 300
    rows = [*ROWS[:2], {"prompt": long, "completion": " x"}, {"prompt": "", "completion": " y"}]
    found = evaluate(rows, ("loss", "exact"))
    assert found.metrics["exact"].n == 2
    assert found.metrics["loss"].n == 3  # after an empty prompt the first token's followers count
    assert set(found.unscored) == {"row 3", "row 4"}
    assert "and the model reads 256" in found.unscored["row 3"]
    assert "there is room for" in found.records[2]["unscored"]["answer"]
    assert found.records[3]["unscored"] == {"answer": "nothing is asked"}


def test_preferences_are_scored_by_both_completions():
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " No."} for row in ROWS
    ]
    found = evaluate(rows, ("preference_accuracy", "preference_margin", "loss"))
    margins = []
    for row in rows:
        chosen, rejected = (
            by_definition({"prompt": row["prompt"], "completion": row[key]})[0]
            for key in ("chosen", "rejected")
        )
        margins.append(rejected - chosen)
    assert found.metrics["preference_margin"].value == pytest.approx(np.mean(margins), rel=1e-4)
    assert found.metrics["preference_accuracy"].value == np.mean(np.asarray(margins) > 0)
    assert len(found.records) == len(rows)


def test_rewards_are_an_adapters_beside_its_base():
    """As DPO defines them (arXiv 2305.18290, section 4), without beta."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " No."} for row in ROWS
    ]
    names = ("preference_margin", "reward_accuracy", "reward_margin")
    tuned = jaxft.adapt(params, jaxft.methods.lora(rank=2, targets=("q_proj",)), jax.random.key(0))
    moved = jax.tree.map(
        lambda leaf: leaf + 0.02, tuned["layers"]["attention"]["q_proj"]["kernel"].b
    )
    kernel = dataclasses.replace(tuned["layers"]["attention"]["q_proj"]["kernel"], b=moved)
    tuned["layers"]["attention"]["q_proj"]["kernel"] = kernel
    settings = {"tokenizer": tokenizer, "batch_size": 2}
    found = jaxft.evaluate(model, tuned, rows, names, **settings)
    base = evaluate(rows, names)
    margins = [
        after["scores"]["preference_margin"] - before["scores"]["preference_margin"]
        for after, before in zip(found.records, base.records, strict=True)
    ]
    assert np.abs(margins).min() > 1e-3
    rewards = [record["scores"]["reward_margin"] for record in found.records]
    np.testing.assert_allclose(rewards, margins, atol=1e-4)
    assert found.metrics["reward_accuracy"].value == np.mean(np.asarray(margins) > 0)
    assert base.metrics["reward_margin"].n == 0
    assert "this is a model alone" in base.records[0]["unscored"]["rewards"]
    whole = jaxft.weights.remember(tuned, jaxft.weights.Saved(whole=(("norm/scale", ()),)))
    with pytest.raises(UserError, match="holds norm/scale whole"):
        jaxft.evaluate(model, whole, rows, names, **settings)


def test_a_figure_without_what_it_needs_is_refused():
    texts = [{"text": "Clara works at the harbour."}]
    assert values(evaluate(texts, ("loss",)))["loss"] > 0
    with pytest.raises(UserError, match="row 1: exact compares answers with references"):
        evaluate(texts, ("loss", "exact"))
    with pytest.raises(UserError, match="preference_accuracy needs rows of prompt, chosen"):
        evaluate(ROWS, ("preference_accuracy",))
    with pytest.raises(UserError, match="there are no rows"):
        evaluate([])


def test_a_cluster_is_a_key_of_the_rows():
    rows = [{**row, "page": number // 2} for number, row in enumerate(ROWS[:4])]
    found = evaluate(rows, ("loss",), cluster="page").metrics["loss"]
    assert (found.n, found.clusters) == (4, 2)
    with pytest.raises(UserError, match=r"row 1: the row has no key 'pag'.*nearest: 'page'"):
        read_items(rows, cluster="pag")


def test_a_text_is_asked_as_a_message_of_a_chat_model_and_recorded_as_it_stands():
    found = evaluate(ROWS[:1], ("loss", "exact"), chat=True, system="Be brief.")
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ROWS[0]["prompt"]},
    ]
    said = generate(model, params, [asked], tokenizer=tokenizer, max_new_tokens=6)
    assert found.records[0]["answer"] == said[0]
    assert found.records[0]["prompt"] == ROWS[0]["prompt"]
    assert found.metrics["loss"].value != values(evaluate(ROWS[:1], ("loss",)))["loss"]


NAMED = {
    "type": "string_check",
    "name": "named",
    "operation": "ilike",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.who }}",
}


def test_graders_judge_answers_to_rows_that_do_not_say_what_is_right():
    said = generate(model, params, ["Where?"], tokenizer=tokenizer, max_new_tokens=6)[0]
    rows = [{"prompt": "Where?", "who": said.upper()}, {"prompt": "Who?", "who": "nobody at all"}]
    found = evaluate(rows, (), graders=[NAMED])
    assert found.metrics["grader/named"].value == 0.5
    assert [one["scores"] for one in found.records] == [
        {"grader/named": 1.0},
        {"grader/named": 0.0},
    ]
    with pytest.raises(UserError, match="row 1: loss is of completions, and the rows have none"):
        evaluate(rows, ("loss",), graders=[NAMED])
    with pytest.raises(UserError, match=r"row 2: the row has no 'who', which grader 'named'"):
        evaluate([rows[0], {"prompt": "Who?"}], (), graders=[NAMED])


def test_graders_compare_embeddings_and_ask_a_models_folder():
    """Which says nothing of use here, as its weights are random."""
    alike = NAMED | {
        "type": "text_similarity",
        "evaluation_metric": "cosine",
        "input": "{{ item.who }}",
    }
    del alike["operation"]
    message = {"role": "user", "content": "How good?"}
    judge = {"type": "score_model", "name": "judge", "model": str(FOLDER), "input": [message]}
    found = evaluate([{"prompt": "Who?", "who": "an old farmer"}], (), graders=[alike, judge])
    assert found.metrics["grader/named"].value == pytest.approx(1.0)
    assert found.unscored["row 1"].startswith("the model's answer holds no result: ")


def test_what_a_grader_cannot_judge_is_named_with_its_reason():
    rows = [{**ROWS[0], "value": None}, {**ROWS[1], "value": "x"}]
    failing = {
        "type": "python",
        "name": "failing",
        "source": "def grade(sample, item):\n    return 1.0 / len(item['value'])",
    }
    found = evaluate(rows, ("exact",), graders=[failing])
    assert (found.metrics["grader/failing"].value, found.metrics["grader/failing"].n) == (1.0, 1)
    assert found.metrics["exact"].n == 2
    assert "TypeError" in found.unscored["row 1"]


def test_a_conversation_that_ends_with_the_user_is_asked_whole():
    talk = [{"role": "user", "content": "Where?"}]
    assert read_items([{"messages": talk}])[0].prompt == talk


def test_no_rows_have_no_likelihoods():
    assert likelihoods(model.config, params, [], tokenizer) == ({}, {})


def test_what_is_put_before_a_question_stands_in_its_rows_too():
    """So that likelihoods are under it as well; a refused question has its answer, and a text asks nothing."""
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    rows = [
        Row("a:1", "prompt_completion", {"prompt": "Who?", "completion": " Ola."}),
        Row("a:2", "messages", {"messages": talk}),
        Row("a:3", "text", {"text": "Ola lives here."}),
    ]

    def before(prompts, room):
        assert (list(prompts), room) == (["a:1", "a:2"], 9)
        new = [{"role": "user", "content": "P. Where?"}]
        return [Asked("P. Who?", "No.", dict), Asked(new, None, dict)]

    first, second, third = with_passages(items_of(rows), before, 9)
    assert (first.rows[0].values["prompt"], first.answer) == ("P. Who?", "No.")
    assert second.rows[0].values["messages"] == [{"role": "user", "content": "P. Where?"}, talk[1]]
    assert (second.answer, third.rows[0].values) == (None, {"text": "Ola lives here."})
