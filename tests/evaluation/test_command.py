"""`jaxft evaluate`: figures of systems side by side, files of them, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxft
from jaxft import cli
from jaxft.evaluation.comparing import compare
from jaxft.retrieval import update_index

GOLDEN = Path(__file__).parents[1] / "golden" / "trl"
FOLDER = str(GOLDEN / "model")
ADAPTER = str(GOLDEN / "adapters" / "lora")
ROWS = [
    {"prompt": f"name: {name} | trade: {trade} =", "completion": f" {name} is a {trade}."}
    for name, trade in (("Greta", "beekeeper"), ("Elif", "baker"), ("Omar", "smith"))
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def run(capsys, *words):
    status = cli.main(["evaluate", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys, *words):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    """What is printed and written of the base beside an adapter."""
    output = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    words = ["--model", FOLDER, "--adapter", ADAPTER, "--base", "--data", data, "--json"]
    words += ["--output", str(output), "--max-new-tokens", "6", "--untouched", data]
    return [*words, "--training", data], output


def test_systems_are_compared_and_written(evaluated, capsys):
    words, output = evaluated
    status, out, _ = run(capsys, *words)
    said = json.loads(out)
    assert status == 0
    assert said["metrics"]["loss"].keys() == {"value", "low", "high", "n", "clusters"}
    assert list(said["systems"]) == ["base", ADAPTER]
    assert [one["kind"] for one in said["in_training"]] == ["exact"] * 3
    loss = next(one for one in said["comparisons"] if one["metric"] == "loss")
    values = [said["systems"][name]["metrics"]["loss"]["value"] for name in ("base", ADAPTER)]
    assert loss["value"] == pytest.approx(values[1] - values[0])
    # On the same rows, what was forgotten is what was learned.
    assert said["untouched"]["comparisons"][0]["value"] == pytest.approx(loss["value"])
    model, params = jaxft.load(FOLDER)
    tuned = jaxft.load_adapter(params, ADAPTER)
    alone = jaxft.evaluate(model, tuned, ROWS, ("loss",), tokenizer=FOLDER)
    assert alone.metrics["loss"].value == pytest.approx(values[1], rel=1e-6)

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["system"] for line in lines] == ["base"] * 3 + [ADAPTER] * 3
    status, out, _ = run(capsys, "--compare", str(output), "--json")
    again = json.loads(out)
    assert again["systems"] == said["systems"]
    assert again["comparisons"] == said["comparisons"]
    assert "there is such a file already" in refused(capsys, *words)


def record(system, answer, score, prompt="Where?"):
    return {
        "system": system, "origin": f"rows.jsonl:{prompt}", "cluster": prompt, "prompt": prompt,
        "references": ["Here"], "answer": answer, "scores": {"exact": score},
        "statistics": {"exact": [score, 1.0]},
    }  # fmt: skip


def written(tmp_path, name, records):
    path = tmp_path / name
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def test_files_are_compared_without_a_model(tmp_path, capsys):
    prompts = [f"Where {number}?" for number in range(30)]
    first = written(tmp_path, "a.jsonl", [record("m", "No", 0.0, one) for one in prompts])
    second = written(tmp_path, "b.jsonl", [record("m", "Here", 1.0, p) for p in prompts[::-1]])
    status, out, _ = run(capsys, "--compare", first, second)
    assert status == 0
    assert (
        f"{second} (m) beside {first} (m): exact +1.0000 (+1.0000 to +1.0000), 30 items: better"
        in out
    )


def test_an_item_that_stands_twice_is_two(tmp_path):
    twice = [record("m", "No", 0.0), record("m", "Here", 1.0)]
    assert compare(twice, twice)["exact"].n == 2


def test_mistakes_are_told_in_one_line(tmp_path, capsys, data):
    one = written(tmp_path, "one.jsonl", [record("m", "Here", 1.0)])
    other = written(tmp_path, "other.jsonl", [record("m", "Here", 1.0, "Who?")])
    said = refused(capsys, "--compare", one, other)
    assert "are of other items: 1 item of" in said
    assert "rows.jsonl:Where?" in said
    assert "holds one system; name a second file" in refused(capsys, "--compare", one)
    assert "not a line of jaxft evaluate --output" in refused(capsys, "--compare", data, one)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"system": "m", "prompt": ')
    assert "damaged.jsonl:1: not JSON" in refused(capsys, "--compare", str(damaged), one)
    empty = written(tmp_path, "empty.jsonl", [])
    assert "empty" in refused(capsys, "--compare", empty, one)
    model = ["--model", FOLDER, "--data"]
    assert "empty" in refused(capsys, *model, empty)
    assert "--data is needed" in refused(capsys, "--model", FOLDER)
    assert "nearest: 'rougeL'" in refused(capsys, *model, data, "--metrics", "rouge")
    assert "give --adapter DIR" in refused(capsys, *model, data, "--untouched", data)
    said = refused(capsys, *model, data, "--metrics", "reward_margin")
    assert "reward_margin is an adapter's beside its base: give --adapter DIR" in said
    assert "--field takes KEY=NAME" in refused(capsys, *model, data, "--field", "prompt")


def test_passages_of_an_index_stand_before_the_questions(data, tmp_path, capsys, monkeypatch):
    """Answers and likelihoods are those under the passages, which every item's line lists."""
    monkeypatch.chdir(tmp_path)
    Path("trades.txt").write_text("Greta is a beekeeper. Elif is a baker. Omar is a smith.")
    update_index("INDEX", ["trades.txt"], {"tokens": 48})
    words = ["--model", FOLDER, "--data", data, "--max-new-tokens", "4", "--json"]
    told = [json.loads(run(capsys, *words, *more)[1]) for more in ([], ["--retrieve", "INDEX"])]
    plain, retrieved = (one["metrics"]["loss"]["value"] for one in told)
    assert abs(plain - retrieved) > 1e-3
    status, _, _ = run(capsys, *words, "--retrieve", "INDEX", "--output", "scores.jsonl")
    assert status == 0
    for line, row in zip(Path("scores.jsonl").read_text().splitlines(), ROWS, strict=True):
        record = json.loads(line)
        assert record["prompt"] == row["prompt"]
        assert [one["source"] for one in record["passages"]] == ["trades.txt"]
        assert record["refused"] is False


def test_passages_go_with_rows_alone(capsys, tmp_path):
    assert "go with --retrieve INDEX" in refused(capsys, "--model", "m", "--data", "d", "--refuse")
    words = ["--model", FOLDER, "--tasks", "t.yaml", "--retrieve", str(tmp_path)]
    assert "--retrieve goes with --data" in refused(capsys, *words)
