"""What a file of each kind gives, and what is said of a faulty one."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data import read_rows
from jaxft.data.sources import read_objects
from jaxft.errors import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "Grüße\n🦊", "completion": ' "x", y'}]
TABLE = pyarrow.Table.from_pylist(ROWS)


def as_csv(separator=","):
    quoted = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
    lines = [separator.join(("prompt", "completion"))]
    lines += [separator.join((quoted(r["prompt"]), quoted(r["completion"]))) for r in ROWS]
    return "\r\n".join(lines).encode()


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow(path, stream):
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.ndjson": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n")
    ),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "b.json": lambda path: path.write_bytes(lines()),
    "a.csv": lambda path: path.write_bytes(as_csv()),
    "b.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + as_csv(";")),
    "a.tsv": lambda path: path.write_bytes(as_csv("\t")),
    "a.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "a.arrow": lambda path: arrow(path, stream=True),
    "b.arrow": lambda path: arrow(path, stream=False),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(as_csv())),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(lines())),
    "without_ending": lambda path: path.write_bytes(lines()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert [row.values for row in read_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize(
    ("name", "places"),
    [("a.json", [2, 6]), ("a.csv", [2, 3]), ("a.parquet", [1, 2]), ("a.arrow", [1, 2])],
)
def test_rows_know_their_line_or_in_a_table_their_number(tmp_path, name, places):
    path = tmp_path / name
    WRITERS[name](path)
    assert [row.origin for row in read_rows(path)] == [f"{path}:{place}" for place in places]


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    """A fault at the end does not keep the first row from coming."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines() + b"{")
    rows = iter(read_rows(path))
    assert next(rows).values == ROWS[0]
    next(rows)
    with pytest.raises(UserError, match=r"a\.jsonl:3: not JSON"):
        next(rows)


def test_a_list_of_one_line_and_an_empty_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS))
    assert [values for _, values in read_objects(path)] == ROWS
    path.write_text(" [ ] ")
    assert list(read_objects(path)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "text": "b"}', ":1: the key 'text' stands twice in one object"),
        ("a.jsonl", b'{"text": NaN}', ":1: text must be a string, not NaN"),
        ("a.jsonl", b'{"text": null}', ":1: text must be a string, not null"),
        ("a.jsonl", b'{"text": {"a": 1}}', ":1: text must be a string, not an object"),
        ("a.jsonl", b'{"text": "a\x00"}', ":1: not JSON: Invalid control character"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "it is text in UTF-16, not UTF-8"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "not JSON lines, as its name says: it is gzip"),
        ("a.jsonl.gz", b'{"text": "a"}', "not gzip, as its name says"),
        (
            "a.jsonl.gz",
            gzip.compress(lines() * 99, mtime=0)[:-20],
            "ended before the end-of-stream",
        ),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', ":1: not JSON: after this row, a comma"),
        ("a.json", b'[{"text": "a"},\n\n{"text" "b"}]', ":3: not JSON: .* at line 3, column 9"),
        ("a.json", b'[{"text": "a"},\n\n 3]', ":3: a row must be an object with keys"),
        ("a.json", b'[{"text": "a"}', "a comma or ] is missing before the end of the file"),
        ("a.json", b'[{"text": "a"}] x', "there is more behind the list: 'x'"),
        ("a.csv", b'{"text": "a"}', "not CSV, as its name says: it begins as JSON lines do"),
        ("a.csv", b"text,id\na,1\nb\n", ":3: 1 cell, but 2 columns"),
        ("a.csv", b"text,id\na,1,2\n", ":2: 3 cells, but 2 columns"),
        ("a.csv", b"text\n\xe9\n", ":2: not UTF-8: byte 1"),
        ("a.csv", b"text,text\na,b\n", ":1: the column 'text' stands twice"),
        ("a.csv", b"text,\na,b\n", ":1: a column without a name"),
        ("a.csv", b'text,id\n"a\n\n b",1\n"c', ":5: not CSV: unexpected end"),
        ("a.csv", b"text,id\ra,b\r", ":1: not CSV: lines that end with CR alone"),
        ("a.csv", b"txt\na\n", r":2: keys found: 'txt'.*nearest: 'text'"),
        ("a.csv", b"text,id\n", "no examples: the file is empty"),
        ("a.parquet", b'{"text": "a"}', "not Parquet, as its name says"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read"),
        ("a.arrow", b"ARROW1 and no more", r"a\.arrow: cannot be read"),
        ("a.txt", b"hello", r"its name does not tell what it is; read are \.jsonl"),
        ("a.zip", b"PK\x03\x04....", "it is a zip archive; read are"),
    ],
)
def test_a_faulty_file_is_one_line_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_faulty_cell_of_a_table_is_told_with_its_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", prompt=["a", None], completion=["b", "c"])
    with pytest.raises(UserError, match=r"a\.parquet:2: prompt must be .* not null"):
        list(read_rows(path))
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    text = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"a\xff"))
    with pytest.raises(UserError, match=r"a\.parquet:2: text: not UTF-8"):
        list(read_rows(parquet(tmp_path / "a.parquet", text=text)))


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow", "a.parquet"])
def test_a_damaged_table_is_one_line_or_whole(tmp_path, name):
    """No byte that is changed, and no end that is missing, ends the process or leaves a traceback."""
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place], whole[:place] + b"\x7f" + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                list(read_rows(path))
            except UserError as error:
                assert str(error).startswith(str(path))  # noqa: PT017


def test_lists_and_objects_of_tables(tmp_path):
    """Nulls of absent keys go; a list may be JSON in a text, or an object of lists."""
    talk = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    for value in (talk, json.dumps(expected), columns):
        path = parquet(tmp_path / "a.parquet", messages=[value])
        assert [row.values["messages"] for row in read_rows(path)] == [expected]
