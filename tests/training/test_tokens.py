"""config.data.add_tokens: texts become tokens, with rows that train and go with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats.merge import merge_folder
from jaxft.inference.opening import open_model, open_words
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, Cut, adapter_of, cut_at, lines

pytestmark = pytest.mark.slow
ADDED = {"data.add_tokens": ("<place>", "<end>"), "steps": 3}
MODEL = str(GOLDEN / "model")
ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def run(
    configure: Callable[..., Any], token_rows: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with two tokens more than its base has."""
    import jax

    folder = tmp_path_factory.mktemp("tokens") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(configure(**ADDED, **{"data.train": token_rows}), folder)
    return folder


def test_the_tokens_rows_and_the_tokenizer_go_with_the_adapter(run: Path) -> None:
    size = open_words(MODEL).tokenizer.vocabulary_size
    words = open_words(MODEL, str(run / "adapter")).tokenizer
    assert words.ids_of(("<place>", "<end>")) == (size, size + 1)
    ids = words.encode("a <place> b <end>")
    assert {size, size + 1} < set(ids)
    assert "<place>" in words.decode(ids)
    options = json.loads((run / "adapter/adapter_config.json").read_text())
    tokens = options["trainable_token_indices"]
    assert tokens in (
        [size, size + 1],
        {"embed_tokens": [size, size + 1], "lm_head": [size, size + 1]},
    )
    rows = [array for name, array in adapter_of(run).items() if "trainable_tokens" in name]
    assert len(rows) == (1 if isinstance(tokens, list) else 2)
    for array in rows:
        assert array.shape[0] == 2
        assert np.abs(array[0] - array[1]).max() > 1e-4  # both began as the mean row
    assert "resize_token_embeddings" in (run / "adapter/README.md").read_text() or size + 2 <= int(
        json.loads(Path(MODEL, "config.json").read_text())["vocab_size"]
    )


def test_the_merged_folder_has_the_tokens(run: Path, tmp_path: Path) -> None:
    model, params = open_model(MODEL, str(run / "adapter"))
    ids = np.asarray(
        [open_words(MODEL, str(run / "adapter")).tokenizer.encode("1 <place> 1 <end>")]
    )
    before = model.apply({"params": params}, ids)
    merge_folder(MODEL, run / "adapter", tmp_path / "merged", dtype="float32")
    model, params = jaxft.load(tmp_path / "merged")
    np.testing.assert_allclose(model.apply({"params": params}, ids), before, atol=2e-5)
    assert model.config.vocabulary == before.shape[-1]
    assert open_words(str(tmp_path / "merged")).tokenizer.encode("<end>")[-1] in range(
        before.shape[-1]
    )


def test_going_on_from_the_adapter_trains_its_tokens(
    configure: Callable[..., Any], run: Path, token_rows: str, tmp_path: Path
) -> None:
    config = configure(**{"adapter": str(run / "adapter"), "data.train": token_rows, "steps": 1})
    train(config, tmp_path / "on")
    before, after = adapter_of(run), adapter_of(tmp_path / "on")
    rows = [name for name in before if "trainable_tokens" in name]
    assert before.keys() == after.keys()
    assert all(np.abs(before[name] - after[name]).max() > 1e-5 for name in rows)
    assert (tmp_path / "on/adapter/tokenizer.json").exists()
    config = configure(
        **{"adapter": str(run / "adapter"), "data.train": token_rows, "data.add_tokens": ("<new>",)}
    )
    with pytest.raises(UserError, match=r"'<new>' is no token that .* trains"):
        train(config, tmp_path / "more")


@pytest.mark.thorough
def test_a_run_that_was_cut_goes_on_bit_for_bit(
    configure: Callable[..., Any],
    run: Path,
    token_rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(**ADDED, **{"data.train": token_rows, "checkpoint.every": 1})
    with monkeypatch.context() as patch:
        cut_at(patch, 2)
        with pytest.raises(Cut):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(run)
    ours, theirs = adapter_of(tmp_path / "cut"), adapter_of(run)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.thorough
def test_full_tuning_saves_a_larger_model(
    configure: Callable[..., Any], token_rows: str, tmp_path: Path
) -> None:
    train(configure("full", **ADDED, **{"data.train": token_rows}), tmp_path / "full")
    model, _ = jaxft.load(tmp_path / "full/model")
    words = open_words(str(tmp_path / "full/model")).tokenizer
    assert max(words.ids_of(("<place>", "<end>"))) < model.config.vocabulary


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("vera", {}, "add_tokens: method vera trains none: PEFT's format holds no rows"),
        ("lora", {"data.add_tokens": ("<a>", "<a>")}, "the token '<a>' is there twice"),
        ("lora", {"data.add_tokens": ("",)}, "the token '' is empty"),
        ("lora", {"method.trainable_token_indices": (10**6,)}, "1000000 is no token of the model"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    method: str,
    settings: dict[str, Any],
    message: str,
    configure: Callable[..., Any],
    token_rows: str,
    tmp_path: Path,
) -> None:
    config = configure(method, **{**ADDED, "data.train": token_rows, **settings})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
