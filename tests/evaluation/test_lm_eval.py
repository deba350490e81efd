"""lm-eval's scores of a jaxft model are those of its own Hugging Face model, on five kinds of tasks with local data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxft
from jaxft import cli
from jaxft.data import load_tokenizer
from jaxft.errors import UserError
from jaxft.evaluation.tasks import run_tasks

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("default"),  # torch, datasets and lm-eval give some
]

FOLDER = Path(__file__).parents[1] / "golden" / "trl" / "model"
PEOPLE = [
    ("Greta", "beekeeper"), ("Elif", "baker"), ("Omar", "smith"), ("Clara", "harbour pilot"),
    ("Jonas", "tailor"), ("Mira", "gardener"),
]  # fmt: skip
DOCS = [
    {
        "question": f"name: {name} | trade: {trade} =",
        "choices": [f"{name} is a {other}." for _, other in PEOPLE[:4]],
        "label": number % 4,
        "answer": f"{name} is a {trade}.",
        # The last is longer than the model reads. Nothing is repeated: of windows that begin alike, lm-eval's own
        # model gives one the score of the other.
        "text": " ".join(f"{name} has {n * n} of {n}." for n in range(1, 2 + 5 * number)),
    }
    for number, (name, trade) in enumerate(PEOPLE)
]
CHOICES = {"doc_to_choice": "choices", "doc_to_target": "label", "output_type": "multiple_choice"}
TASKS = {
    "choice": {
        **CHOICES,
        "doc_to_text": "{{question}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "choice_fewshot": {
        **CHOICES,
        "doc_to_text": "{{question}}",
        "num_fewshot": 2,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    },
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks as YAML files (of which JSON is a part), over a file of documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    files = []
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder)},
            "test_split": "test",
            "fewshot_split": "test",
        }
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({**shared, **task}))
        files.append(str(file))
    return files


@pytest.fixture(scope="module")
def theirs(tasks):
    """What lm-eval makes of the same folder in transformers, in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(FOLDER), device="cpu", dtype="float32", batch_size=4)
    return simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True)


def test_scores_are_lm_evals(tasks, theirs):
    model, params = jaxft.load(FOLDER)
    found = run_tasks(model, params, load_tokenizer(FOLDER), tasks, batch_size=3)
    compared = 0
    for task, results in theirs["results"].items():
        for key, value in results.items():
            name = f"{task}/{key.removesuffix(',none')}"
            if name in found.metrics:
                compared += 1
                assert found.metrics[name].value == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert compared == len(found.metrics) == 9
    answers = [one["answer"] for one in found.records if one["origin"].startswith("answer:")]
    assert answers == [one["filtered_resps"][0] for one in theirs["samples"]["answer"]]


def test_every_likelihood_is_lm_evals(tasks, theirs):
    """The scores could agree by chance; the numbers that they are made of do not."""
    from lm_eval import simple_evaluate

    from jaxft.evaluation import LanguageModel

    model, params = jaxft.load(FOLDER)
    ours = simple_evaluate(
        model=LanguageModel(model, params, FOLDER), tasks=tasks, bootstrap_iters=0, log_samples=True
    )
    compared = 0
    for task in ("choice", "choice_fewshot", "last_words", "rolling"):
        for one, two in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for mine, other in zip(one["filtered_resps"], two["filtered_resps"], strict=True):
                pair = [item if isinstance(item, tuple) else (item,) for item in (mine, other)]
                assert [float(x) for x in pair[0]] == pytest.approx(
                    [float(x) for x in pair[1]], rel=1e-4, abs=1e-4
                )
                compared += 1
    assert compared == 6 * (4 + 4 + 1 + 1)


def test_the_command_runs_tasks_and_names_the_nearest(tasks, capsys):
    words = ["evaluate", "--model", str(FOLDER), "--json", "--tasks"]
    assert cli.main([*words, f"{tasks[0]},{tasks[4]}"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"]["choice/acc"]["n"] == len(DOCS)
    assert cli.main([*words, "helaswag"]) == 2
    assert "nearest: 'hellaswag'" in capsys.readouterr().err


def test_a_conversation_may_be_left_open():
    from jaxft.evaluation import LanguageModel

    model, params = jaxft.load(FOLDER)
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "It is"}]
    found = LanguageModel(model, params, FOLDER).apply_chat_template(talk, False)
    assert found.endswith("It is")


def test_an_answer_that_leaves_no_room_for_a_question_is_refused():
    from jaxft.evaluation import LanguageModel

    model, params = jaxft.load(FOLDER)
    with pytest.raises(UserError, match="answers of 256 tokens"):
        LanguageModel(model, params, FOLDER)._settings({"until": "."})
