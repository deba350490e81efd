"""`jaxft data` shows what the model will see, and reads no weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import load_config
from jaxft.errors import UserError
from jaxft.formats.config_file import model_config
from jaxft.objectives.preview import main, preview
from jaxft.training.feed import prepare_data
from jaxft.training.sharding import make_mesh
from tests.small_runs import GOLDEN, RECIPE


def page(config: Any, **options: Any) -> str:
    """The preview as one text."""
    return "\n".join(preview(config, **options))


@pytest.fixture
def weightless(tmp_path: Path) -> str:
    """The model's folder without its weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return str(shutil.copytree(GOLDEN / "model", tmp_path / "model", ignore=ignore))


def test_all_that_the_model_will_see(
    configure: Callable[..., Any], weightless: str, tmp_path: Path
) -> None:
    """Counts, sources, lengths, fill, warnings, examples; from config.json and the tokenizer alone."""
    rows = (GOLDEN / "data.jsonl").read_text(encoding="utf-8").splitlines()
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join([rows[0], rows[0], '{"prompt": "q =", "completion": ""}']) + "\n")
    config = configure(
        **{
            "model": weightless,
            "data.eval": str(mine),
            "data.packing": True,
            "epochs": 2.0,
            "steps": 0,
        }
    )
    text = page(config, plot=str(tmp_path / "lengths.png"), shown=2)
    assert f"training data: {len(rows)} examples (prompt_completion)" in text
    assert f"packed: {len(rows)} examples in " in text
    assert "% filled" in text
    assert f"{GOLDEN / 'data.jsonl'}  " in text
    assert "- held-out data: 2 of 3 (66.7 %) examples stand in the training data as well" in text
    assert f"empty completion (first: {mine}:3)" in text
    assert f"duplicates (first: {mine}:2 of {mine}:1)" in text
    first = json.loads(rows[0])
    assert f"{first['prompt']}[[{first['completion']}" in text
    assert f"{GOLDEN / 'data.jsonl'}:{len(rows) // 2 + 1}: " in text
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_without_packing_its_gain_is_told(configure: Callable[..., Any]) -> None:
    """And no example is shown where none is wanted."""
    text = page(configure(), shown=0)
    assert "not packed: a row an example; data.packing=True would make" in text
    assert "[[" not in text
    assert text.endswith("warnings:\n  - none\n")


def test_ids_that_the_model_lacks_do_not_end_it(
    configure: Callable[..., Any], weightless: str
) -> None:
    """They are a warning here; train refuses them."""
    path = Path(weightless) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    text = page(configure(model=weightless), shown=0)
    assert "examples have token ids at or above the model's vocabulary of 100" in text


def test_a_file_that_exists_is_not_written_over(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """It is refused before anything is read."""
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.png: exists already"):
        preview(configure(**{"data.train": "nothing.jsonl"}), plot=str(tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_data_that_has_to_be_given(configure: Callable[..., Any]) -> None:
    """One clear line."""
    with pytest.raises(UserError, match=r"config\.data\.train: give"):
        preview(configure(**{"data.train": ""}))


@pytest.mark.parametrize(
    ("terminal", "plain", "found"),
    [(True, False, "\x1b[32m"), (True, True, "[["), (False, False, "[[")],
)
def test_colour_is_for_terminals(
    terminal: bool,
    plain: bool,
    found: str,
    configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NO_COLOR is honoured."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    main(configure(), plot="", shown=1)
    text = capsys.readouterr().out
    assert found in text
    assert ("\x1b" in text) == (found != "[[")


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    """`jaxft data ... | head -1`, also where the terminal knows ASCII alone."""
    words = [
        sys.executable,
        "-m",
        "jaxft",
        "data",
        "--config",
        f"{RECIPE}:lora",
        "--examples",
        "40",
    ]
    words += [f"--config.model={GOLDEN / 'model'}", f"--config.data.train={GOLDEN / 'data.jsonl'}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_text_that_is_not_used_is_shown_here_and_stops_training(
    recipe: str, configure: Callable[..., Any], weightless: str, tmp_path: Path
) -> None:
    """Before a weight is read; the line says what to type."""
    answers = {"completion": "b"} if recipe == "sft" else {"chosen": "b", "rejected": "c"}
    rows = [{"prompt": "a", **answers, "context": text} for text in ("", "Here.")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    changes = {"model": weightless, "data.train": str(path)}
    recipe = RECIPE.replace("sft", recipe)
    text = page(configure(recipe=recipe, **changes), shown=0)
    assert "- training data: 1 of 2 (50 %) rows have 'context': text of the example that" in text
    assert f"--config.data.ignore=context; train refuses them (first: {path}:2)" in text
    mesh = make_mesh(configure().mesh)
    model = model_config(weightless)
    with pytest.raises(UserError, match=rf"^{path}:2: 'context': .*--config\.data\.ignore=context"):
        prepare_data(configure(recipe=recipe, **changes), model, mesh)
    changes["data.ignore"] = ("context",)
    assert "context" not in page(configure(recipe=recipe, **changes), shown=0)
    assert len(prepare_data(configure(recipe=recipe, **changes), model, mesh).lines) == 1


@pytest.mark.parametrize("judged", [False, True])
def test_preferences_are_shown_as_they_train(judged: bool, weightless: str) -> None:
    """Pairs, or KTO's completions with their labels; what the shared prompt saves; rows of two lengths."""
    file = GOLDEN.parent / "preferences" / ("judged.jsonl" if judged else "pairs.jsonl")
    changes = {
        "model": weightless,
        "data.train": str(file),
        "data.max_length": 128,
        "data.packing": True,
        "objective.name": "kto" if judged else "dpo",
    }
    text = page(load_config(f"{RECIPE.replace('sft', 'dpo')}:lora", changes), shown=1)
    count = len(file.read_text(encoding="utf-8").splitlines())
    kind = "judged completions" if judged else "pairs"
    assert f"training data: {count} {kind}; " in text
    assert "shared prompts save" in text
    assert "rows of 256" in text
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    name = ("desirable" if first["label"] else "undesirable") if judged else "chosen"
    assert f"  {name}:\n    [[{first['completion' if judged else 'chosen']}" in text
    assert text.count(first["prompt"]) == 1
