"""Which files a name means."""

from __future__ import annotations

import json

import fsspec
import pyarrow
import pytest

from jaxft.data import read_rows
from jaxft.data.files import find_files
from jaxft.errors import UserError

LINE = '{"text": "a"}\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content=LINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def origins(name, **options):
    return [row.origin for row in read_rows(name, **options)]


def save(folder, split=None):
    """As `datasets` saves a data set, of two shards."""
    place = folder / split if split else folder
    table = pyarrow.table({"text": [split or "a"]})
    for shard in ("z.arrow", "y.arrow"):
        place.mkdir(parents=True, exist_ok=True)
        with pyarrow.ipc.new_stream(str(place / shard), table.schema) as writer:
            writer.write_table(table)
    listed = [{"filename": "z.arrow"}, {"filename": "y.arrow"}]
    write(place / "state.json", json.dumps({"_data_files": listed}))
    write(place / "dataset_info.json", "{}")


def test_a_folder_is_all_its_data_in_the_order_of_the_names(here):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deeper/c.jsonl", "d/README.md", "d/.cache/x.jsonl"):
        write(here / name)
    rows = read_rows("d")
    assert [row.origin for row in rows] == ["d/a.jsonl:1", "d/b.jsonl:1", "d/deeper/c.jsonl:1"]
    assert rows.sources[0].notes == ("3 files", "not read: README.md")


def test_a_glob_is_what_it_matches(here):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        write(here / name)
    assert origins("a*.jsonl") == ["a1.jsonl:1", "a2.jsonl:1"]
    assert origins(f"{here}/a?.jsonl") == [f"{here}/a1.jsonl:1", f"{here}/a2.jsonl:1"]
    write(here / "[x].jsonl")
    assert origins("[x].jsonl") == ["[x].jsonl:1"]


def test_files_named_after_splits_are_told_apart(here):
    for name in ("d/data/train-0.jsonl", "d/data/train-1.jsonl", "d/data/test-0.jsonl"):
        write(here / name)
    assert origins("d") == ["d/data/train-0.jsonl:1", "d/data/train-1.jsonl:1"]
    assert origins("d", held_out=True) == origins("d:test") == ["d/data/test-0.jsonl:1"]
    with pytest.raises(
        UserError, match=r"no split 'tset'; there are: test, train \(nearest: 'test'"
    ):
        origins("d:tset")


def test_a_saved_data_set_is_read_in_its_own_order_and_a_dict_by_split(here):
    save(here / "one")
    assert origins("one") == ["one/z.arrow:1", "one/y.arrow:1"]
    for split in ("train", "validation", "extra"):
        save(here / "two", split)
    write(here / "two/dataset_dict.json", '{"splits": ["train", "validation", "extra"]}')
    assert origins("two") == ["two/train/z.arrow:1", "two/train/y.arrow:1"]
    assert origins("two", held_out=True)[0] == "two/validation/z.arrow:1"
    assert origins("two:extra")[0] == "two/extra/z.arrow:1"
    assert origins("two/extra")[0] == "two/extra/z.arrow:1"


@pytest.mark.parametrize("entry", ["../a.jsonl", "/etc/passwd", "..", 3])
def test_a_saved_data_set_names_files_of_its_folder_alone(here, entry):
    write(here / "d/state.json", json.dumps({"_data_files": [{"filename": entry}]}))
    with pytest.raises(UserError, match=r"d/state.json: _data_files must be a list of names"):
        origins("d")


def test_a_remote_place_is_read_like_a_folder():
    system = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl"):
        system.pipe(f"/bucket/{name}", LINE.encode())
    expected = ["memory:///bucket/a.jsonl:1", "memory:///bucket/b.jsonl:1"]
    assert origins("memory://bucket") == origins("memory://bucket/*.jsonl") == expected
    assert origins("memory://bucket/a.jsonl") == ["memory://bucket/a.jsonl:1"]
    with pytest.raises(UserError, match=r"no such file \(nearest: 'a.jsonl', 'b.jsonl'\)"):
        origins("memory://bucket/aa.jsonl")


def test_a_remote_place_that_fails_is_one_line(monkeypatch):
    def fail(self, path, mode):
        raise RuntimeError("no\ncredentials")

    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", LINE.encode())
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.open", fail)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read: RuntimeError: no credentials"):
        origins("memory://bucket/a.jsonl")


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    def missing(name):
        raise ImportError("not there")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=f"{scheme}:// needs the package {package}.*pip install"):
        origins(f"{scheme}://bucket/a.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.jsonl", r"no such file \(nearest: 'train.jsonl'"),
        ("fulll/a.jsonl", r"no such file \(nearest: 'full'"),
        (
            "full/*.csv",
            r"nothing matches \(nearest: 'a.jsonl'|nothing matches \(there are: a.jsonl",
        ),
        ("ful/*.jsonl", r"nothing matches \(nearest: 'full'"),
        ("empty", r"no data in this folder: it is empty; read are \.jsonl"),
        ("other", r"no data in this folder; there are: notes.txt; read are"),
        ("mixed", r"mixed/b.jsonl:1: mixed formats: messages, but mixed/a.jsonl:1 is text"),
        ("gsx://a/b", r"no such kind of storage: gsx:// \(nearest"),
        ("/dev/null", "neither a file nor a folder"),
        ("broken", "broken: cannot be read|broken/state.json"),
    ],
)
def test_what_is_not_there_is_one_line(here, name, message):
    for path in ("train.jsonl", "full/a.jsonl", "other/notes.txt", "mixed/a.jsonl"):
        write(here / path)
    (here / "empty").mkdir()
    talk = {"messages": [{"role": "user", "content": "a"}]}
    write(here / "mixed/b.jsonl", json.dumps(talk))
    write(here / "broken/state.json", "{")
    with pytest.raises(UserError, match=message) as error:
        origins(name)
    assert "\n" not in str(error.value)


def test_an_empty_shard_of_a_folder_is_no_fault_but_an_empty_folder_is(here):
    write(here / "d/a.jsonl", "")
    with pytest.raises(UserError, match="d: no examples: the data set is empty"):
        origins("d")
    write(here / "d/b.jsonl")
    assert origins("d") == ["d/b.jsonl:1"]


def test_sources_of_their_own_may_differ_in_format(here):
    write(here / "a.jsonl")
    write(here / "b.jsonl", '{"prompt": "a", "completion": "b"}')
    rows = list(read_rows("a.jsonl,b.jsonl"))
    assert [(row.format, row.source) for row in rows] == [("text", 0), ("prompt_completion", 1)]


def test_a_data_set_of_the_hub_says_what_to_do():
    said = "alpaca: no such file; .* is hf://datasets/tatsu-lab/alpaca$"
    with pytest.raises(UserError, match=said):
        find_files("tatsu-lab/alpaca")
