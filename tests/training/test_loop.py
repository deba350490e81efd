"""`train` writes the run's folder, and going on equals never having stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxft
from jaxft.data import load_tokenizer
from jaxft.errors import UserError
from jaxft.formats.manifest import check_manifest
from jaxft.formats.merge import merge_folder
from jaxft.inference.opening import open_words
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, Cut, adapter_of, cut_at, held_out, lines

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"method.dropout": 0.1, "data.shuffle": True}),
        ("full", {"data.packing": True, "optimizer.learning_rate": 1e-3}),
        pytest.param("lora_fa", {"grad_accum": 2}, marks=pytest.mark.thorough),
        pytest.param("delta_lora", {"method.start_step": 4}, marks=pytest.mark.thorough),
        pytest.param("vera", {}, marks=pytest.mark.thorough),
    ],
)
def test_going_on_equals_never_stopping(
    method: str,
    settings: dict[str, Any],
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: metrics, samples and the exported tensors, with dropout and a shuffled order."""
    config = configure(method, **settings, **held_out())
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_at(patch, 4)
        with pytest.raises(Cut):
            train(config, tmp_path / "cut")
    assert len(lines(tmp_path / "cut")) == 4
    assert not (tmp_path / "cut" / "adapter").exists()
    train(config, tmp_path / "cut")
    for split in ("train", "eval"):
        assert lines(tmp_path / "cut", split) == lines(tmp_path / "whole", split)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("cut", "whole")]
    assert samples[0] == samples[1]
    cut, whole = adapter_of(tmp_path / "cut"), adapter_of(tmp_path / "whole")
    assert cut.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(cut[name], tensor, err_msg=name)


@pytest.mark.usefixtures("plotted")
def test_the_runs_folder_is_the_contracts(configure: Callable[..., Any], tmp_path: Path) -> None:
    """config.json runs again, metrics have their keys, and an evaluation stands at 0 and every N."""
    config = configure(**held_out())
    result = train(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "plots",
        "samples.jsonl",
        "summary.json",
        "report.html",
    }
    assert {path.name for path in result.output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "manifest.json",
    }
    assert check_manifest(result.output)["trained_on"] == "texts"
    assert result.plot.read_bytes()[:4] == b"\x89PNG"
    row = lines(tmp_path / "run", timed=True)[0]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens"}
    assert row.keys() == keys | {"tokens_per_second", "split"}
    assert [row["step"] for row in lines(tmp_path / "run", "eval")] == [0, 2, 4, 6]
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample.keys() == {"step", "prompt", "completion", "reference"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    adapter = sum(tensor.size for tensor in adapter_of(tmp_path / "run").values())
    assert (summary["steps"], summary["trained_parameters"]) == (6, adapter)
    assert 0 < summary["weights_bytes"] < summary["peak_bytes"]
    assert f"{adapter:,}" in (tmp_path / "run" / "report.html").read_text()
    again = train(config, tmp_path / "run")  # a finished run has nothing left to do
    assert again.steps == result.steps
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert len(lines(tmp_path / "run")) == 6


def test_metrics_of_answers_are_those_of_evaluate(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """They join the held-out numbers of each evaluation; at the end they are the exported adapter's."""
    names = ("f1", "chrf")
    settings = {"eval_metrics": names, "eval_rows": 100, "samples.max_new_tokens": 8}
    config = configure(**held_out(), **settings)
    result = train(config, tmp_path / "run")
    found = lines(tmp_path / "run", "eval")
    assert all({"loss", *names} <= line.keys() for line in found)
    model, params = jaxft.load(config.model)
    params = jaxft.load_adapter(params, result.output)
    rows, options = config.data.eval, {"tokenizer": config.model, "max_new_tokens": 8}
    told = jaxft.evaluate(model, params, rows, names, **options).metrics
    for name in names:
        assert found[-1][name] == pytest.approx(told[name].value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exct", "metric 'exct' is unknown .nearest: 'exact'"),
        ("loss", "loss is reported in any case"),
        ("preference_accuracy", "needs rows of prompt, chosen and rejected"),
    ],
)
def test_a_metric_that_cannot_be_had_is_told_before_anything_is_written(
    name: str, says: str, configure: Callable[..., Any], tmp_path: Path
) -> None:
    config = configure(**held_out(), eval_metrics=(name,))
    with pytest.raises(UserError, match=f"config.eval_metrics: .*{says}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_trained_on_chats_says_so_and_how(
    method: str,
    configure: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The template goes with what a run exports, vouched for like the rest; the hint asks a chat."""
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    (tmp_path / "chats.jsonl").write_text(4 * (json.dumps({"messages": turns}) + "\n"))
    settings = {"data.chat_template": "chatml", "steps": 1, "samples.count": 0}
    config = configure(method, **settings, **{"data.train": str(tmp_path / "chats.jsonl")})
    output = train(config, tmp_path / "run").output
    assert "im_start" in (output / "chat_template.jinja").read_text()
    manifest = check_manifest(output, required=True)
    assert "chat_template.jinja" in manifest["files"]
    assert manifest["trained_on"] == "chats"
    assert "next: jaxft chat --model " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_tokenizer_goes_with_what_was_trained_by_it(
    method: str, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Whole, with one set of templates; it is asked by it, merged with it and trained on by it."""
    base, own = tmp_path / "base", tmp_path / "own"
    shutil.copytree(configure().model, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("base's")
    shutil.copytree(base, own, ignore=shutil.ignore_patterns("*.safetensors", "additional*"))
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    (tmp_path / "chats.jsonl").write_text(4 * (json.dumps({"messages": turns}) + "\n"))
    settings = {"model": str(base), "steps": 1, "samples.count": 0, "tokenizer": str(own)}
    config = configure(method, **settings, **{"data.train": str(tmp_path / "chats.jsonl")})
    output = train(config, tmp_path / "run").output
    assert (output / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    assert (output / "chat_template.jinja").read_text().endswith("!{% endfor %}")
    assert not (output / "additional_chat_templates" / "rag.jinja").exists()
    check_manifest(output, required=True)
    if method == "lora":
        asked = open_words(str(base), str(output)).tokenizer
        merge_folder(base, output, tmp_path / "merged")
        merged = load_tokenizer(tmp_path / "merged")
        assert asked.chat_template == merged.chat_template == load_tokenizer(own).chat_template
        config.adapter, config.tokenizer = str(output), ""
        again = train(config, tmp_path / "again").output
        assert load_tokenizer(again).chat_template == merged.chat_template


def test_tensorboard_gets_the_numbers(configure: Callable[..., Any], tmp_path: Path) -> None:
    """`report_to` names further places."""
    pytest.importorskip("tensorboardX")
    train(configure(report_to=("tensorboard",), steps=1), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_folder_that_is_no_run_is_left_alone(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing of the user's is overwritten."""
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not a run.*thesis\.tex"):
        train(configure(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="a file stands where"):
        train(configure(), tmp_path / "thesis.tex")


def test_another_configuration_is_shown(configure: Callable[..., Any], tmp_path: Path) -> None:
    """A run goes on as it began, or not at all."""
    train(configure(steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match=r"another configuration.*seed: 42 -> 7.*steps: 1 -> 2"):
        train(configure(steps=2, seed=7), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.train": ""}, "config.data.train: give a file"),
        ({"data.max_length": 100000}, "exceeds the model's"),
        ({"data.train": "nowhere.jsonl"}, "no such file"),
        ({"model": "nowhere"}, "nowhere"),
        ({"method.targets": ("q_prj",)}, r"'q_prj' matches nothing.*q_proj"),
        ({"method.train_also": ("final_nrm",)}, r"'final_nrm' matches nothing.*final_norm"),
        ({"method.rank_pattern": {"q_prj": 2}}, r"'q_prj' fits no adapted module.*q_proj"),
        ({"method.layers_to_transform": (9,)}, "no layer 9"),
        ({"mesh.data": 1000}, "does not fit"),
        ({"optimizer.warmup_steps": 9}, "exceeds the run's 6 updates"),
        ({"optimizer.decay": (("nrm", True),)}, "'nrm' matches nothing"),
    ],
)
def test_mistakes_leave_no_folder(
    overrides: dict[str, Any], message: str, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """One line that names the key, and nothing written."""
    with pytest.raises(UserError, match=message) as error:
        train(configure(**overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_kind_is_refused(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """`config.adapter` holds a DoRA and the method is LoRA."""
    config = configure(adapter=str(GOLDEN / "adapters" / "dora"))
    with pytest.raises(UserError, match="DoRA adapter, and method lora trains LoRA"):
        train(config, tmp_path / "run")


def test_delta_lora_goes_on_from_a_lora(configure: Callable[..., Any], tmp_path: Path) -> None:
    """An ordinary adapter is where its base begins to move."""
    config = configure("delta_lora", adapter=str(GOLDEN / "adapters" / "lora"), steps=3)
    train(config, tmp_path / "run")
    assert np.isfinite(lines(tmp_path / "run")[-1]["loss"])


@pytest.mark.parametrize("packing", [False, True])
def test_data_that_changed_is_noticed(
    packing: bool, configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word of one row, the file's name and number of rows as before: the file is named."""
    rows = (GOLDEN / "data.jsonl").read_text(encoding="utf-8")
    data = tmp_path / "own.jsonl"
    data.write_text(rows, encoding="utf-8")
    config = configure(**{"data.train": str(data), "data.packing": packing, "checkpoint.every": 2})
    with monkeypatch.context() as patch:
        cut_at(patch, 4)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    data.write_text(rows.replace("the", "teh", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.jsonl: its examples changed since the checkpoint"):
        train(config, tmp_path / "run")
    data.write_text(rows, encoding="utf-8")
    assert train(config, tmp_path / "run").steps == 6
