"""Runs on preferences: what the reference costs and how it moves, what is kept in the folder, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.cli import main
from jaxft.configuration import load_config
from jaxft.errors import UserError
from jaxft.training.loop import train
from jaxft.training.reference import left_out
from jaxft.tree import filled
from tests.small_runs import GOLDEN, Cut, cut_at, lines

pytestmark = pytest.mark.slow

PAIRS = GOLDEN.parent / "preferences"
RECIPE = str(Path(__file__).parents[2] / "configs" / "dpo.py")
SMALL = {
    "model": str(GOLDEN / "model"),
    "data.train": str(PAIRS / "pairs.jsonl"),
    "data.max_length": 128,
    "batch_size": 4,
    "eval_batch_size": 8,
    "steps": 6,
    "optimizer.learning_rate": 1e-2,
    "samples.count": 1,
    "samples.max_new_tokens": 4,
    "mesh.data": 1,
    "method.rank": 4,
}


def configured(method: str = "lora", **overrides: Any) -> ConfigDict:
    small = {key: value for key, value in SMALL.items() if method != "full" or key != "method.rank"}
    return load_config(f"{RECIPE}:{method}", small | overrides)


def losses(folder: Path, split: str = "train") -> list[float]:
    return [line["loss"] for line in lines(folder, split)]


@pytest.mark.usefixtures("plotted")
def test_a_run_writes_its_metrics_and_plots(tmp_path: Path) -> None:
    """Train and held-out lines have all averages; the first loss is log 2; rewards are drawn."""
    train(configured(**{"data.eval": str(PAIRS / "pairs.jsonl"), "data.packing": True}), tmp_path)
    kinds, sides = ("rewards", "logps", "lengths"), ("chosen", "rejected")
    names = {f"{kind}/{side}" for kind in kinds for side in sides}
    names |= {"loss", "kl", "rewards/margins", "rewards/accuracies"}
    for split in ("train", "eval"):
        assert all(names <= line.keys() for line in lines(tmp_path, split))
        assert losses(tmp_path, split)[0] == pytest.approx(np.log(2.0), abs=1e-6)
    assert lines(tmp_path, "eval")[-1]["rewards/margins"] > 0.1
    assert (tmp_path / "plots" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert row["reference"].startswith(" ")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"objective.reference_every": 2}),
        ("lora", {"objective.precompute": True, "data.eval": str(PAIRS / "pairs.jsonl")}),
        pytest.param(
            "full",
            {"objective.reference_every": 1, "objective.reference_mix": 0.1},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_going_on_equals_never_stopping(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the reference moves, and where its log-probabilities were computed before."""
    config = configured(
        method, **{"checkpoint.every": 2, "optimizer.learning_rate": 1e-3}, **changes
    )
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_at(patched, 4)
        with pytest.raises(Cut):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    for split in ("train", "eval"):
        assert lines(tmp_path / "whole", split) == lines(tmp_path / "cut", split)


def test_accumulation_and_devices_change_nothing(tmp_path: Path) -> None:
    """Losses and rewards of one part and of four, and of one and four devices, with a likelihood term."""
    changes: list[dict[str, int]] = [{}, {"grad_accum": 4}, {"mesh.data": 2, "mesh.fsdp": 2}]
    found = []
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        train(configured(**{"objective.sft_weight": 0.3, "steps": 2, **change}), folder)
        found.append(lines(folder))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            numbers = [{k: v for k, v in row.items() if k != "split"} for row in (one, two)]
            assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-4)


def test_the_reference_is_the_base_and_is_held_once(tmp_path: Path) -> None:
    """The tree with adapters left out has the base's own arrays, and trained norms as they were.

    What the tree remembers of its adapter's folder is no array.
    """
    _, params = jaxft.load(GOLDEN / "model")
    method = jaxft.methods.lora(rank=4, train_also=("*_norm",))
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    trainable, frozen = jaxft.partition(adapted, method)
    reference = filled(left_out(frozen), left_out(trainable))
    assert reference.keys() - params.keys() == {"saved"}
    del reference["saved"]
    jax.tree.map(np.testing.assert_array_equal, reference, params)
    kernel = reference["layers"]["attention"]["q_proj"]["kernel"]
    assert kernel is params["layers"]["attention"]["q_proj"]["kernel"]


def test_a_fresh_adapters_reference_needs_nothing_beside_the_base(tmp_path: Path) -> None:
    """Left out, or a copy of the fresh adapter: the same losses; with trained norms too."""
    also = {"method.train_also": ("*_norm",)}
    train(configured(**also), tmp_path / "out")
    never = {"objective.reference_every": 1000}
    train(configured(**also, **never), tmp_path / "copy")
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(tmp_path / "copy"), rtol=1e-5)


def test_going_on_from_an_adapter_begins_at_its_policy(tmp_path: Path) -> None:
    """SFT, then DPO from its adapter: the first loss is log 2, and rewards are 0."""
    config = load_config(
        f"{RECIPE.replace('dpo', 'sft')}:lora",
        SMALL | {"data.train": str(GOLDEN / "data.jsonl"), "steps": 4},
    )
    sft = train(config, tmp_path / "sft")
    train(configured(adapter=str(sft.output)), tmp_path / "dpo")
    first = lines(tmp_path / "dpo")[0]
    assert first["loss"] == pytest.approx(np.log(2.0), abs=1e-6)
    assert first["rewards/chosen"] == 0.0


def test_precomputed_log_probabilities_are_checked(tmp_path: Path) -> None:
    """Of other data, of another base, or no such file: one clear line each."""
    config = configured(**{"objective.precompute": True})
    train(config, tmp_path / "run")
    known = tmp_path / "run" / "reference" / "train.npz"
    rows = (PAIRS / "pairs.jsonl").read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows[::-1]) + "\n")
    model = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    scaled = {name: 1.1 * x for name, x in tensors.items()}
    save_file(scaled, model / "model.safetensors", {"format": "pt"})
    for name, change, says in (
        ("data", {"data.train": str(other)}, "of other data"),
        ("base", {"model": str(model)}, "of another reference"),
    ):
        target = tmp_path / name / "reference"
        target.mkdir(parents=True)
        settled = {"data.date": "2024-02-29", "dtype": "float32", "param_dtype": "float32"}
        changed = configured(**{"objective.precompute": True}, **settled, **change)
        shutil.copy(known, target / "train.npz")
        (tmp_path / name / "config.json").write_text(jaxft.configuration.to_json(changed))
        with pytest.raises(UserError, match=says) as caught:
            train(changed, tmp_path / name)
        assert str(target / "train.npz") in str(caught.value)
    known.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not log-probabilities of a reference"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.train": str(GOLDEN / "data.jsonl")}, "data.jsonl:1: a row for SFT"),
        ({"objective.name": "kto"}, "pairs.jsonl:1: a row of pairs"),
        ({"objective.beta": "0"}, "config.objective.beta takes a number above 0"),
        ({"objective.name": "dop"}, "(nearest: 'dpo'"),
        ({"objective.name": "simpo", "objective.precompute": "True"}, "simpo has no reference"),
        ({"objective.gamma": "1.0"}, "dpo takes none; it is for simpo"),
        ({"objective.name": "exo_pair"}, "exo_pair needs a number above 0"),
        ({"objective.reference": "nowhere"}, "nowhere"),
        ({"objective.name": "kto", "grad_accum": "4"}, "batch_size=4 and grad_accum=4 leave one"),
        ({"data.max_length": "8"}, "the completions alone exceed it"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, with exit status 2."""
    words = {key: str(value) for key, value in (SMALL | changes).items()}
    flags = [f"--config.{key}={value}" for key, value in words.items()]
    assert (
        main(["train", "--config", f"{RECIPE}:lora", "--workdir", str(tmp_path / "run"), *flags])
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("jaxft: ")
    assert says in said


def test_offloading_the_frozen_copy_changes_no_number(tmp_path: Path) -> None:
    """Full tuning, the copy in the host's memory."""
    found: list[list[float]] = []
    for name, away in (("here", False), ("away", True)):
        change: dict[str, Any] = {
            "objective.reference_offload": away,
            "optimizer.learning_rate": 1e-3,
        }
        train(configured("full", **change), tmp_path / name)
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(*found, rtol=1e-6)
