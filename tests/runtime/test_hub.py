"""Names of the hub, asked of a stand-in by the real client: what is fetched, what is told, what is uploaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft.assets import model_folder
from jaxft.cli import main
from jaxft.configuration import to_json
from jaxft.data import read_rows
from jaxft.data.files import find_files
from jaxft.errors import UserError
from jaxft.formats.config_file import model_config
from jaxft.formats.safetensors import open_folder
from jaxft.planning.abstract import abstract_params
from jaxft.runs.folder import check_folder
from jaxft.runs.pinned import pinned
from jaxft.runtime import hub as client
from jaxft.runtime.storage import fetched
from jaxft.training import loop
from jaxft.training.sharding import make_mesh

from .stand_in import Hub

# The client warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "trl" / "model"
NAME = "Qwen/small"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture
def model(hub: Hub) -> str:
    """A tiny model with its tokenizer on the hub, beside things that are never fetched; its commit."""
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"code",
        "tokenizer.py": b"code",
        "a.onnx": b"?",
    }
    return hub.put(NAME, content(TINY) | unwanted)


def test_a_name_is_read_as_a_folder_is(hub: Hub, model: str) -> None:
    """Config, tokenizer and safetensors come, and nothing that could run."""
    shape, params = jaxft.load(NAME)
    same, expected = jaxft.load(TINY)
    assert shape.config == same.config
    ours, theirs = params["embed"]["embedding"], expected["embed"]["embedding"]
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert not [name for name in hub.downloaded if name.endswith((".bin", ".py", ".onnx"))]
    assert model_folder(NAME).name == model


def test_without_weights_none_are_fetched(hub: Hub, model: str) -> None:
    """As for `jaxft plan` and `jaxft data`."""
    folder = model_folder(NAME, weights=False)
    assert (folder / "config.json").exists()
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def test_plan_fetches_no_weights(hub: Hub, model: str) -> None:
    """The run's tree as shapes, adapter and all; what follows asks the compiler alone."""
    config = jaxft.load_config(
        f"{ROOT}/configs/sft.py:lora", {"model": NAME, "mesh.data": 1, "param_dtype": "float32"}
    )
    shape = model_config(model_folder(NAME, weights=False))
    _, params = abstract_params(config, shape, make_mesh(config.mesh))
    assert params["layers"]["attention"]["q_proj"]["kernel"].a.shape[0] == shape.layers
    assert hub.downloaded
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def test_what_is_in_the_cache_is_not_fetched_again(
    hub: Hub, model: str, fresh: Callable[[], None]
) -> None:
    model_folder(NAME)
    before = list(hub.downloaded)
    fresh()
    model_folder(NAME)
    assert hub.downloaded == before


def test_shards_come_by_their_index(hub: Hub) -> None:
    """And those alone: another file of safetensors stays."""
    files = content(GOLDEN / "models" / "llama_bias")
    hub.put(NAME, files | {"consolidated.safetensors": b"?"})
    folder = model_folder(NAME)
    assert len(open_folder(folder)) == len(open_folder(GOLDEN / "models" / "llama_bias"))
    assert "consolidated.safetensors" not in hub.downloaded


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, model: str) -> None:
    other = hub.put(NAME, {"config.json": b"{}"}, branch="v2")
    assert model_folder(f"{NAME}@v2", weights=False).name == other
    assert model_folder(f"{NAME}@{model}", weights=False).name == model
    assert model_folder(f"https://huggingface.co/{NAME}", weights=False).name == model


def test_a_folder_of_that_name_wins_and_that_is_said(
    hub: Hub, model: str, fresh: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder(NAME, weights=False)
    fresh()
    shutil.copytree(TINY, NAME)
    assert model_folder(NAME) == Path(NAME)
    assert f"{NAME}: the folder of that name is taken" in capsys.readouterr().err
    assert model_folder(f"hf://{NAME}").name == model


def test_an_adapter_comes_likewise(hub: Hub) -> None:
    hub.put("me/adapter", content(GOLDEN / "adapters" / "lora") | {"optimizer.pt": b"pickle"})
    _, params = jaxft.load(GOLDEN / "models" / "llama")
    loaded = jaxft.load_adapter(params, "me/adapter")
    expected = jaxft.load_adapter(params, GOLDEN / "adapters" / "lora")
    ours, theirs = (
        tree["layers"]["attention"]["q_proj"]["kernel"].a for tree in (loaded, expected)
    )
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert "optimizer.pt" not in hub.downloaded


def test_mistakes_say_what_to_do(hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("meta/gated", {"config.json": b"{}"}, gated=True)
    assert "no such model at" in refused(lambda: model_folder("Qwen/absent"))
    assert "HF_TOKEN" in refused(lambda: model_folder("Qwen/absent"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "the token may not see it" in refused(lambda: model_folder("Qwen/absent"))
    assert f"accept its terms at {hub.url}/meta/gated" in refused(
        lambda: model_folder("meta/gated")
    )
    assert "no revision 'mian' (nearest: 'main')" in refused(lambda: model_folder(f"{NAME}@mian"))
    hub.failing = 503
    assert "cannot be asked" in refused(lambda: model_folder("Qwen/other"))


def test_without_a_connection_the_cache_holds(
    hub: Hub, model: str, fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    model_folder(NAME)
    hub.close()
    fresh()
    assert model_folder(NAME).name == model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fresh()
    assert model_folder(NAME).name == model
    assert "HF_HUB_OFFLINE is set, and it is not whole in" in refused(
        lambda: model_folder("Qwen/other")
    )


def test_a_full_disk_is_told(hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "set HF_HOME to a folder on another disk" in refused(lambda: model_folder(NAME))


def test_the_environment_says_where_the_hub_is(hub: Hub, model: str, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME, in a process of its own; HF_HUB_OFFLINE then finds it there."""
    code = f"from jaxft.assets import model_folder; print(model_folder({NAME!r}, weights=False))"
    there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    for offline in ("0", "1"):
        environment = os.environ | there | {"HF_HUB_OFFLINE": offline}
        made = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert made.stdout.strip().endswith(model)
        assert made.stdout.startswith(str(tmp_path / "home"))


def test_a_run_keeps_the_commit_that_it_began_with(
    hub: Hub, model: str, tmp_path: Path, fresh: Callable[[], None]
) -> None:
    """The same command goes on from it when the branch has moved; a revision that is asked for is another run."""
    config = jaxft.load_config(f"{ROOT}/configs/sft.py:lora", {"model": NAME, "tokenizer": NAME})
    begun = pinned(config, tmp_path)
    assert (begun.model, begun.tokenizer) == (f"{NAME}@{model}", f"{NAME}@{model}")
    (tmp_path / "config.json").write_text(to_json(begun))
    moved = hub.put(NAME, content(TINY) | {"added_tokens.json": b"{}"})
    assert pinned(config, tmp_path).model == f"{NAME}@{model}"
    fresh()
    assert pinned(config, tmp_path / "other").model == f"{NAME}@{moved}"
    config.model = f"{NAME}@main"
    assert pinned(config, tmp_path).model == f"{NAME}@{moved}"
    with pytest.raises(UserError, match="another configuration"):
        check_folder(pinned(config, tmp_path), tmp_path)


def test_names_of_folders_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    config = jaxft.load_config(f"{ROOT}/configs/sft.py:lora", {"model": str(TINY)})
    assert pinned(config, tmp_path) is config
    assert not hub.asked


def test_an_adapter_names_its_base_and_the_commit(tmp_path: Path) -> None:
    """As PEFT finds it again."""
    _, params = jaxft.load(GOLDEN / "models" / "llama")
    params = jaxft.load_adapter(params, GOLDEN / "adapters" / "lora")
    jaxft.save_adapter(params, tmp_path / "adapter", base=f"{NAME}@{'a' * 40}")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (NAME, "a" * 40)
    assert f"base_model: {NAME}\n" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.thorough
def test_a_run_is_of_the_hub_from_beginning_to_end(
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN/config.json and the adapter name the commit; the same command goes on from it when the branch has moved."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 4)
    monkeypatch.setattr(loop, "plot_run", lambda folder, *_: folder)
    monkeypatch.setattr(loop, "plot_averages", lambda *_: None)
    given = {
        "model": NAME, "data.train": str(tmp_path / "a.jsonl"), "data.max_length": 16, "batch_size": 2, "mesh.data": 1,
        "method.rank": 2, "samples.count": 0,
    }  # fmt: skip

    def run(steps: int) -> str:
        with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic
            config = jaxft.load_config(f"{ROOT}/configs/sft.py:lora", {**given, "steps": steps})
            jaxft.train(config, tmp_path / "run")
        return str(json.loads((tmp_path / "run" / "config.json").read_text())["model"])

    assert run(1) == f"{NAME}@{model}"
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, model)
    hub.put(NAME, {"config.json": b"{}"})
    assert run(2) == f"{NAME}@{model}"


def rows_of(name: str, **options: bool) -> list[str]:
    return [row.values["text"] for row in read_rows(name, **options)]


def test_a_data_set_is_read_by_its_name(hub: Hub) -> None:
    """Its files of data alone; the split that training or evaluation takes, or a path inside."""
    files = {
        "data/train-00000.jsonl": b'{"text": "a"}\n', "data/test-00000.jsonl": b'{"text": "b"}\n',
        "other/c.jsonl": b'{"text": "c"}\n', "script.py": b"code", "README.md": b"# data",
    }  # fmt: skip
    commit = hub.put("datasets/me/rows", files)
    assert rows_of("hf://datasets/me/rows/data") == ["a"]
    assert rows_of("hf://datasets/me/rows/data", held_out=True) == ["b"]
    assert rows_of("hf://datasets/me/rows/data:test") == ["b"]
    assert "other/c.jsonl" not in hub.downloaded
    assert rows_of(f"hf://datasets/me/rows@{commit}/other/c.jsonl") == ["c"]
    assert rows_of("hf://datasets/me/rows/data/t*.jsonl") == ["b", "a"]
    assert "script.py" not in hub.downloaded


def test_a_data_set_that_is_not_there_is_told(hub: Hub) -> None:
    hub.put("datasets/me/rows", {"README.md": b"# data"})
    assert "no such data set" in refused(lambda: find_files("hf://datasets/me/none"))
    assert "no data there" in refused(lambda: find_files("hf://datasets/me/rows"))
    assert "is hf://datasets/OWNER/NAME" in refused(lambda: find_files("hf://rows"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with its card and manifest."""
    _, params = jaxft.load(GOLDEN / "models" / "llama")
    jaxft.save_adapter(
        jaxft.load_adapter(params, GOLDEN / "adapters" / "lora"), tmp_path / "adapter"
    )
    return tmp_path / "adapter"


def test_push_makes_a_private_repository_with_the_card(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was uploaded is read by its name again. Pushing it once more changes nothing."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    (adapter / "notes.txt").write_text("mine")
    assert main(["push", "--folder", str(adapter), "--repository", "me/new"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{hub.url}/me/new\n"
    assert "not uploaded: notes.txt" in said.err
    assert hub.repositories["models/me/new"]["visibility"] == "private"
    there = hub.files("me/new")
    assert there["README.md"] == (adapter / "README.md").read_bytes()
    assert "notes.txt" not in there
    assert (
        json.loads((fetched("me/new") / "adapter_config.json").read_text())["peft_type"] == "LORA"
    )
    before = len(hub.repositories["models/me/new"]["commits"])
    assert "these very files" in client.push(adapter, "me/new")
    assert len(hub.repositories["models/me/new"]["commits"]) == before


def test_push_overwrites_nothing_unless_told(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    mine = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"other", "extra": b"kept"}
    hub.put("me/old", mine)
    message = refused(lambda: client.push(adapter, "me/old"))
    assert "adapter_config.json, adapter_model.safetensors; --overwrite" in message
    assert hub.files("me/old") == mine
    client.push(adapter, "me/old", overwrite=True)
    there = hub.files("me/old")
    assert there["extra"] == b"kept"
    weights = "adapter_model.safetensors"
    assert there[weights] == (adapter / weights).read_bytes()


def test_push_of_a_model_writes_a_card_where_there_is_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    shutil.copytree(GOLDEN / "models" / "llama", tmp_path / "model")
    client.push(tmp_path / "model", "me/model", public=True)
    assert (
        hub.files("me/model")["README.md"].decode().startswith("---\nlibrary_name: transformers\n")
    )
    assert hub.repositories["models/me/model"]["visibility"] == "public"


def test_what_cannot_be_pushed_is_refused(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    assert "is no OWNER/NAME" in refused(lambda: client.push(adapter, "name"))
    assert "give RUN/adapter" in refused(lambda: client.push(tmp_path / "none", "me/new"))
    assert f"give {tmp_path / 'adapter'}" in refused(lambda: client.push(tmp_path, "me/new"))
    assert "HF_TOKEN" in refused(lambda: client.push(adapter, "me/new"))  # nobody is logged in
    assert not hub.repositories
