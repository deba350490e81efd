"""Files of folders that come from elsewhere."""

from __future__ import annotations

import os

import pytest

from jaxft.errors import UserError
from jaxft.runtime.untrusted import file_of, parse_object, read_bytes, read_json, stays_inside


@pytest.fixture
def cache(tmp_path):
    """A snapshot of Hugging Face's cache: (its folder, the hub's)."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (hub / "models--a--b/blobs").mkdir()
    (hub / "models--a--b/blobs/beef").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    return snapshot, hub


def test_a_link_of_the_cache_stays_inside_and_any_other_does_not(cache, tmp_path):
    snapshot, hub = cache
    assert stays_inside(snapshot, snapshot / "config.json")
    (hub / "models--c--d/blobs").mkdir(parents=True)
    (hub / "models--c--d/blobs/beef").write_text("{}")
    for name, target in {
        "another": "../../../models--c--d/blobs/beef",
        "absolute": "/etc/passwd",
        "above": "../../../../x",
        "circle": "circle",
    }.items():
        (snapshot / name).symlink_to(target)
        assert name == "circle" or not stays_inside(snapshot, snapshot / name), name
    (tmp_path / "link").symlink_to(snapshot)
    assert stays_inside(tmp_path / "link", tmp_path / "link/config.json")
    (snapshot / "own").symlink_to("config.json")
    assert stays_inside(snapshot, snapshot / "own")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder", "circle", "absent", "a" * 5000, "a\0b"):
        with pytest.raises(UserError, match=r"not a regular file|cannot be read"):
            read_bytes(tmp_path / name, 10)


def test_a_file_that_is_too_large_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes; at most 4 are read"):
        read_bytes(tmp_path / "a", 4)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'{"a":[' + b"[]," * 2_000_000 + b"1]}", "values are too many"),
        (b'{"a":"' + "ß".encode() * 5_000_000 + b'"}', "bytes are too many"),
        (b"[]", "an object is expected, not list"),
    ],
    ids=range(7),
)
def test_json_within_limits(data, says):
    with pytest.raises(UserError, match=says) as error:
        parse_object(data, "x.json")
    assert str(error.value).startswith("x.json: ")


def test_a_name_twice_is_refused_where_it_matters():
    assert parse_object(b'{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(UserError, match="'a' stands there twice"):
        parse_object(b'{"b": {"a": 1, "a": 2}}', "x", unique=True)


def test_a_missing_file_says_what_there_is(tmp_path):
    (tmp_path / "b").write_text("{}")
    with pytest.raises(UserError, match=r"no c\.json; there are: b"):
        file_of(tmp_path, "c.json", "a folder")
    with pytest.raises(UserError, match="no such folder; a folder with c"):
        file_of(tmp_path / "x", "c.json", "a folder with c")
    assert read_json(file_of(tmp_path, "b", "")) == {}
