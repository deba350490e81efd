"""A manifest notices whatever happened to a folder since it was written."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxft
from jaxft.errors import UserError
from jaxft.formats.manifest import (
    NAME,
    Damaged,
    check_manifest,
    fingerprint,
    tell_another_base,
    write_manifest,
)

MODEL = Path(__file__).parents[1] / "golden" / "trl" / "model"
FILES = {"a.bin": bytes(range(64)), "inner/b.bin": b"b" * 100, "empty": b""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few files, with its manifest."""
    made = tmp_path_factory.mktemp("written") / "folder"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    write_manifest(made, base={"x": "y"})
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that jaxft wrote."""
    _, params = jaxft.load(MODEL)
    method = jaxft.methods.lora(rank=2)
    target = tmp_path_factory.mktemp("adapters") / "adapter"
    jaxft.save_adapter(
        jaxft.adapt(params, method, jax.random.key(0)), target, method=method, base=MODEL
    )
    return target


def test_an_unharmed_folder_gives_its_manifest(folder: Path, tmp_path: Path) -> None:
    """With what was put beside the digests; a folder without one has nothing to say."""
    written = check_manifest(folder, required=True)
    assert written["base"] == {"x": "y"}
    assert written["files"].keys() == FILES.keys()
    assert check_manifest(tmp_path) == {}
    with pytest.raises(Damaged, match=r"manifest\.json is missing"):
        check_manifest(tmp_path, required=True)


@given(data=st.data(), name=st.sampled_from([*FILES, NAME]), cut=st.booleans())
def test_any_flipped_bit_and_any_cut_is_noticed(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    name: str,
    cut: bool,
) -> None:
    """Of each file, which is named. A manifest whose own damage is refused by no one says the same as before."""
    harmed = tmp_path_factory.mktemp("harmed") / "folder"
    shutil.copytree(folder, harmed)
    content = bytearray((harmed / name).read_bytes())
    if not content:
        content += b"x"
    elif cut:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (harmed / name).write_bytes(content)
    if name != NAME:
        with pytest.raises(Damaged, match=name):
            check_manifest(harmed)
        return
    with contextlib.suppress(Damaged):
        assert check_manifest(harmed)["files"] == check_manifest(folder)["files"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": {"a": 1}}',
        '{"files": {"../a": "0"}}',
        '{"files": {"/etc/hostname": "0"}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """In one line; nothing outside of the folder is read."""
    (tmp_path / NAME).write_text(text)
    with pytest.raises(Damaged) as error:
        check_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_adapter_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    """One flipped bit in a tensor, which safetensors does not see; without a manifest the folder loads."""
    _, params = jaxft.load(MODEL)
    jaxft.load_adapter(params, saved)
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    (folder / "README.md").write_text("People write on a model card.")
    jaxft.load_adapter(params, folder)
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*not what was written"):
        jaxft.load_adapter(params, folder)
    (folder / NAME).unlink()
    jaxft.load_adapter(params, folder)


def test_a_damaged_model_is_not_loaded(tmp_path: Path) -> None:
    """A folder that `save` wrote."""
    model, params = jaxft.load(MODEL)
    jaxft.save(model, params, tmp_path / "model", like=MODEL)
    jaxft.load(tmp_path / "model")
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        jaxft.load(tmp_path / "model")


def test_an_adapter_remembers_its_base(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another base of the same shapes is told of, and not refused."""
    tell_another_base(saved, MODEL)
    assert capsys.readouterr().err == ""
    shutil.copytree(MODEL, tmp_path / "other")
    content = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(content)
    tell_another_base(saved, tmp_path / "other")
    said = capsys.readouterr().err
    assert "was trained on another base" in said
    assert "model.safetensors differ" in said


def test_a_fingerprint_follows_the_files(tmp_path: Path) -> None:
    """It is computed again when a file changes."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    before = fingerprint(tmp_path, ("*.json", "nothing*"))
    assert before.keys() == {"config.json"}
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert fingerprint(tmp_path, ("*.json",)) != before
