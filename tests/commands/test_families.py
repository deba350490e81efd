"""Every family through the command line: trained, answering, and merged into a folder that answers alike."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft import cli
from jaxft.models import FAMILIES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/golden/family_folders.py"
specification = importlib.util.spec_from_file_location("family_folders", SCRIPT)
golden = importlib.util.module_from_spec(specification)
specification.loader.exec_module(golden)

WORDS = 384  # of the tokenizer; the cases have fewer
FIRST: dict[str, str] = {}  # {model_type: its first case}
for case_name, its in golden.cases().items():
    FIRST.setdefault(its["config"]["model_type"], case_name)


def worded(case):
    """The case with a row for each of the tokenizer's words, and the tokenizer."""
    config = json.loads(json.dumps(case["config"]))
    for settings in (config, config.get("text_config", {})):
        rows = [key for key in settings if key.startswith("vocab_size")]
        settings.update(dict.fromkeys(rows, WORDS))
    wide = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight", "wte.weight")
    tensors = {
        name: [before, WORDS, *shape[1:]] if name.endswith(wide) else [before, *shape]
        for name, (before, *shape) in case["tensors"].items()
    }
    return {"config": config, "tensors": tensors}


@pytest.fixture
def asked(capsys):
    """`asked("generate", "--model", folder)`: what the command prints."""

    def ask(*words):
        assert cli.main(list(map(str, words))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return ask


def logits(folder, tokens, adapter=None):
    model, params = jaxft.load(folder)
    params = params if adapter is None else jaxft.load_adapter(params, adapter)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens))


def test_every_family_has_a_case():
    assert FIRST.keys() >= FAMILIES.keys()


@pytest.mark.thorough
@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_a_family_is_trained_and_merged_by_the_command_line(name, asked, tmp_path):
    """The merged folder has the logits and the answers of the base with its adapter, and not the base's."""
    folder = golden.write_folder(worded(golden.cases()[name]), tmp_path / "model")
    golden.write_tokenizer(folder)
    rows = [{"prompt": f"name {i}, near {i}?", "completion": f" the {i} place"} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with jax.numpy_dtype_promotion("standard"):
        asked(
            *("train", "--config", f"{ROOT}/configs/sft.py:lora", "--workdir", tmp_path / "run"),
            *("--config.model", folder, "--config.data.train", data, "--config.steps=2"),
            *("--config.batch_size=8", "--config.data.max_length=32", "--config.method.rank=2"),
            *("--config.optimizer.learning_rate=0.05", "--config.optimizer.warmup_steps=0"),
        )
    adapter, merged = tmp_path / "run/adapter", tmp_path / "merged"
    asked("merge", "--model", folder, "--adapter", adapter, "--output", merged)
    drawn = ("--data", data, "--max-new-tokens", 4, "--temperature", 1)  # greedy ones may be empty
    answers = [
        asked("generate", "--model", folder, "--adapter", adapter, *drawn),
        asked("generate", "--model", merged, *drawn),
    ]
    assert any(json.loads(line)["completion"] for line in answers[0].splitlines())
    assert answers[0] == answers[1]
    tokens = np.random.Generator(np.random.PCG64(0)).integers(3, WORDS, (2, 24), np.int32)
    wanted = logits(folder, tokens, adapter)
    largest = np.abs(wanted).max()
    assert np.abs(logits(merged, tokens) - wanted).max() < 1e-4 * largest
    assert np.abs(logits(folder, tokens) - wanted).max() > 1e-2 * largest
