"""jaxft.formats.safetensors: reading, writing, and refusing what is damaged."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.formats.safetensors import Lazy, open_file, open_folder, write_file, write_folder

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)])
TENSORS = st.dictionaries(st.text("ab.é", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES))


def lazy(arrays):
    return {
        name: Lazy(array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    }


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TENSORS)
def test_what_is_written_is_read_back_and_is_the_librarys_own_file(tmp_path, kinds):
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(size=shape).astype(dtype) for name, (shape, dtype) in kinds.items()}
    write_file(tmp_path / "ours", lazy(arrays))
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, stored in open_file(tmp_path / "ours").items():
        assert stored.read().dtype == arrays[name].dtype
        np.testing.assert_array_equal(stored.read(), arrays[name])


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    def fail():
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a", {"x": Lazy((2,), np.dtype("float32"), fail)})
    assert not (tmp_path / "a").exists()


def test_a_model_is_divided_by_size_and_each_shard_holds_what_fits(tmp_path):
    arrays = {name: np.full(100, number, np.float32) for number, name in enumerate("abcde")}
    write_folder(tmp_path, lazy(arrays), {}, limit=800)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 500, "total_size": 2000}
    read = open_folder(tmp_path)
    assert {name: stored.read()[0] for name, stored in read.items()} == dict(
        zip("abcde", range(5), strict=True)
    )


def _header(file, change):
    """Rewrites a file's header."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _entry(**changes):
    return lambda header: header | {"b": header["b"] | changes}


SPOILED = {
    "empty": (lambda file: file.write_bytes(b""), "truncated or no safetensors"),
    "short": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "truncated: b ends"),
    "long": (lambda file: file.write_bytes(file.read_bytes() + b"12"), "2 bytes after the last"),
    "no safetensors": (lambda file: file.write_bytes(b"x" * 64), "truncated or no safetensors"),
    "header": (
        lambda file: file.write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(40)),
        "the header: not JSON",
    ),
    "list": (
        lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"),
        "the header: an object is expected, not list",
    ),
    "overlap": (lambda file: _header(file, _entry(data_offsets=[0, 12])), "b: overlaps"),
    "gap": (lambda file: _header(file, _entry(data_offsets=[16, 28])), "b: leaves a gap"),
    "size": (lambda file: _header(file, _entry(shape=[4])), "b: F32 .4. takes 16 bytes"),
    "dtype": (lambda file: _header(file, _entry(dtype="F7")), "b: dtype F7 is not known"),
    "shape": (lambda file: _header(file, _entry(shape=[-3])), "b: a damaged entry"),
    "twice": (
        lambda file: file.write_bytes(file.read_bytes().replace(b'"b"', b'"a"', 1)),
        "'a' stands there twice",
    ),
    "2^63": (
        lambda file: file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:]),
        "the header has 9223372036854775808 bytes, the file",
    ),
    "beyond": (lambda file: _header(file, _entry(data_offsets=[2**40, 2**40 + 12])), "b: leaves"),
    "dtype list": (lambda file: _header(file, _entry(dtype=["F32"])), "b: a damaged entry"),
    "huge": (lambda file: _header(file, _entry(shape=[0, 2**64])), "b: a damaged entry"),
    "axes": (lambda file: _header(file, _entry(shape=[1] * 99 + [3])), "b: a damaged entry"),
    "name": (
        lambda file: _header(file, lambda header: header | {"\n" * 9999: 1}),
        "n...: a damaged entry",
    ),
    "entry": (lambda file: _header(file, lambda header: header | {"b": 1}), "b: a damaged entry"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_damaged_file_is_one_clear_line(tmp_path, spoil, message):
    file = tmp_path / "model.safetensors"
    write_file(file, lazy({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}))
    spoil(file)
    with pytest.raises(UserError, match=message) as error:
        open_folder(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "'../a.safetensors' leads out of the folder"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "the shard 2.safetensors is missing"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "b is missing, which .* places there"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' leads out of the folder"),
        ({"a": ".."}, "leads out of the folder"),
        ({"a": ""}, "'' is the name of no file"),
        ({"a": "a\\b"}, "stands in a folder below: put the file beside the index"),
        ({"a": "parts/1.safetensors"}, "stands in a folder below: put the file beside the index"),
        ({"a": "./../1.safetensors"}, "leads out of the folder"),
        ({"a": "./2.safetensors"}, "the shard 2.safetensors is missing"),
        ({"a": "x" * 5000}, "the shard .* is missing"),
        ({"a": "pytorch_model.bin"}, "the shard pytorch_model.bin is missing"),
        ({"a": "link"}, "'link' is a link that leads out of the folder, to '/etc/passwd'"),
        ({"a": "pipe"}, "pipe: not a regular file"),
        ({"a": 1}, "no weight_map of names"),
        (None, "no weight_map of names"),
    ],
)
def test_a_damaged_index_is_one_clear_line(tmp_path, weight_map, message):
    write_file(tmp_path / "1.safetensors", lazy({"a": np.zeros(3, np.float32)}))
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_a_shard_may_be_named_from_the_folder_on(tmp_path):
    write_file(tmp_path / "1.safetensors", lazy({"a": np.arange(3, dtype=np.float32)}))
    index = {"weight_map": {"a": "./1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_folder(tmp_path)["a"].read().tolist() == [0.0, 1.0, 2.0]


def test_a_tensor_stands_in_one_shard(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        write_file(tmp_path / name, lazy({"a": np.zeros(3, np.float32)}))
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"a stands in 1.safetensors and in 2.safetensors"):
        open_folder(tmp_path)


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path):
    """Its files are links to the blobs beside it: those an index names as well."""
    snapshot, blobs = tmp_path / "models--a/snapshots/1", tmp_path / "models--a/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_file(blobs / "beef", lazy({"a": np.zeros(3, np.float32)}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/beef")
    assert open_folder(snapshot).keys() == {"a"}
    (snapshot / "model.safetensors").rename(snapshot / "1.safetensors")
    index = json.dumps({"weight_map": {"a": "1.safetensors"}})
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert open_folder(snapshot).keys() == {"a"}


def two_ways(folder, stem="model"):
    """A folder as one gets it by copying a newer file over older shards."""
    write_file(folder / f"{stem}.safetensors", lazy({"a": np.ones(3, np.float32)}))
    write_file(folder / "1.safetensors", lazy({"a": np.zeros(3, np.float32)}))
    index = json.dumps({"weight_map": {"a": "1.safetensors"}})
    (folder / f"{stem}.safetensors.index.json").write_text(index)


@pytest.mark.parametrize(
    ("stem", "library"), [("model", "transformers"), ("adapter_model", "PEFT")]
)
def test_the_whole_file_goes_before_an_index_as_in_transformers_and_peft(
    tmp_path, capsys, stem, library
):
    two_ways(tmp_path, stem)
    for _ in range(2):
        assert open_folder(tmp_path, stem)["a"].read().tolist() == [1, 1, 1]
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} holds its weights twice" in said
    assert f"{stem}.safetensors is read, as {library} does" in said
    (tmp_path / f"{stem}.safetensors").unlink()
    assert open_folder(tmp_path, stem)["a"].read().tolist() == [0, 0, 0]
    assert capsys.readouterr().err == ""


def test_the_whole_file_is_read_where_the_index_names_a_shard_that_is_gone(tmp_path):
    two_ways(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    assert open_folder(tmp_path)["a"].read().tolist() == [1, 1, 1]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the shard 1.safetensors is missing, which"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin is a pickle"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin is a pickle"),
        (["training_args.bin", "optimizer.pt"], "no model.safetensors; there are: opt"),
        (["model-00001-of-00002.safetensors"], "shards without their index: model.safetensors.ind"),
        (["model.fp16.safetensors"], "to read the variant model.fp16.safetensors, rename it"),
        (["model.safetensors.index.fp16.json"], "variant of model.safetensors.index.fp16.json, re"),
        (["adapter_model.safetensors"], "an adapter without its base"),
    ],
)
def test_a_folder_without_weights_that_are_read_says_what_to_do(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)
