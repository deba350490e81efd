from __future__ import annotations

import pytest

from jaxft.data import sources
from jaxft.errors import UserError


def read_rows(*arguments, **settings):
    return list(sources.read_rows(*arguments, **settings))


PAIR = {"prompt": "a", "completion": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TALK = {"messages": [USER, ASSISTANT]}


def test_every_row_knows_its_file_and_line(write):
    path = write(PAIR, "", PAIR)
    assert [row.origin for row in read_rows(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("values", "format"),
    [
        (PAIR, "prompt_completion"),
        ({"completion": [ASSISTANT], "prompt": [USER]}, "prompt_completion"),
        (TALK, "messages"),
        ({"text": "a"}, "text"),
    ],
)
def test_formats_are_recognised_by_their_keys(write, values, format):
    (row,) = read_rows(write(values))
    assert (row.format, row.values, row.unused) == (format, values, ())


def test_other_keys_are_named_and_not_used(write):
    rows = read_rows(write(PAIR | {"id": 3}, PAIR | {"source": "x", "id": 4}))
    assert [row.values for row in rows] == [PAIR, PAIR]
    assert [row.unused for row in rows] == [("id",), ("source", "id")]


def test_several_files_are_read_one_after_the_other(write):
    one, two = write(PAIR, name="one.jsonl"), write(PAIR, PAIR, name="two.jsonl")
    expected = [f"{one}:1", f"{two}:1", f"{two}:2"]
    for paths in (f"{one}, {two}", [one, two], (str(one), str(two))):
        assert [row.origin for row in read_rows(paths)] == expected


def test_a_comma_may_stand_in_a_name(write):
    assert len(read_rows(str(write(PAIR, name="a,b.jsonl")))) == 1


def test_a_row_that_fits_two_formats_needs_one_named(write):
    path = write(PAIR | TALK)
    with pytest.raises(UserError, match=r":1: .*several formats \(prompt_completion, messages\)"):
        read_rows(path)
    (row,) = read_rows(path, "messages")
    assert (row.values, row.unused) == (TALK, ("prompt", "completion"))


def test_windows_line_ends_a_byte_order_mark_and_line_separators_are_fine(write):
    path = write(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r', b'{"text": "\\ud83e\\udd8a"}\r')
    assert [row.values["text"] for row in read_rows(path)] == ["a\u2028b", "🦊"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": "b"', r"not JSON: .* at column 34"),
        ("name : Aromi || text", "not JSON: .*'name : Aromi || text'"),
        (b'{"text": "\xff\xfe"}', "not UTF-8: byte 11"),
        (r'{"text": "\ud83e"}', "half of a surrogate pair"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON that can be read"),
        ('["a", "b"]', "must be an object with keys, not a list"),
        ("3", "must be an object with keys, not a number"),
        ({"promt": "a", "completion": "b"}, r"keys found: 'promt', 'completion'.*'prompt'"),
        ({"mesages": []}, r"keys found: 'mesages'; a row needs .*\(nearest: 'messages'\)"),
        ({}, "keys found: none; a row needs prompt \\+ completion; messages; text"),
        (
            {"prompt": "a", "completion": 3},
            "completion must be a string or a list of messages, not a number",
        ),
        ({"prompt": None, "completion": "b"}, "prompt must be .* not null"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "not a string and a list"),
        ({"prompt": [], "completion": [ASSISTANT]}, "prompt must be .* not an empty list"),
        ({"messages": "hi"}, "messages must be a list of messages, not a string"),
        ({"messages": []}, "not an empty list"),
        ({"messages": ["hi"]}, "message 1 must be an object, not a string"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no 'content'"),
        ({"messages": [{"rôle": "user", "content": "a"}]}, r"no 'role' \(nearest: 'rôle'\)"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a string, not null"),
        (
            {"messages": [USER, {"role": "asistant", "content": "b"}]},
            r"message 2: unknown role 'asistant'; known: system, .*\(nearest: 'assistant'\)",
        ),
        ({"text": ["a"]}, "text must be a string, not a list"),
        (TALK, "mixed formats: messages, but .*:1 is prompt_completion"),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            r"mixed formats: prompt_completion \(messages\), but",
        ),
    ],
)
def test_a_bad_line_is_told_with_its_place(write, line, message):
    path = write(PAIR, "", line)
    with pytest.raises(UserError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_an_error(write, lines):
    with pytest.raises(UserError, match=r"train\.jsonl: no examples: the file is empty"):
        read_rows(write(*lines))


def test_one_empty_file_among_several_is_an_error(write):
    with pytest.raises(UserError, match=r"two\.jsonl: no examples"):
        read_rows([write(PAIR), write(name="two.jsonl")])


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write(PAIR)
    with pytest.raises(UserError, match=r"no such file \(nearest: 'train.jsonl'\)"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no data file is given"):
        read_rows("")


def test_an_unknown_format_names_the_known(write):
    with pytest.raises(UserError, match=r"'message' is unknown; known: auto, .*'messages'"):
        read_rows(write(TALK), "message")


def test_sharegpts_turns_may_stand_under_messages_and_prompt(write):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", "weight": 0}]
    asked = {"role": "user", "content": "Why?"}
    said = {"role": "assistant", "content": "So.", "weight": 0}
    [row] = read_rows(write({"messages": turns}))
    assert row.values["messages"] == [asked, said]
    [row] = read_rows(write({"prompt": turns[:1], "completion": turns[1:]}))
    assert (row.values["prompt"], row.values["completion"]) == ([asked], [said])
    with pytest.raises(UserError, match="messages, message 1 has no 'value'"):
        list(read_rows(write({"messages": [{"from": "human"}]})))
