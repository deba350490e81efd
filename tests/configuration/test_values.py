"""Text and Python values become values of the key's type, or one clear line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.configuration.values import from_text, from_value
from jaxft.errors import UserError


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (0, "1000", 1000),
        (0, "1e3", 1000),
        (0, "1_000", 1000),
        (0, " -1 ", -1),
        (0, "123456789012345678901", 123456789012345678901),
        (0.0, "3", 3.0),
        (0.0, "2e-4", 2e-4),
        (False, "true", True),
        (False, "True", True),
        (True, "0", False),
        (False, "yes", True),
        (True, "Off", False),
        ("", "a b", "a b"),
        ("x", "", ""),
        ("", "'quoted'", "quoted"),
        ("", "1e3", "1e3"),
        ((), "q_proj", ("q_proj",)),
        ((), "q_proj,v_proj", ("q_proj", "v_proj")),
        ((), "q_proj, v_proj,", ("q_proj", "v_proj")),
        ((), "(q_proj,v_proj)", ("q_proj", "v_proj")),
        ((), '("q_proj","v_proj")', ("q_proj", "v_proj")),
        ((), '["q_proj"]', ("q_proj",)),
        ((), "attention/*,[gu]*_proj", ("attention/*", "[gu]*_proj")),
        ((), "0,2", (0, 2)),
        ((), "3", (3,)),
        (("a",), "()", ()),
        (("a",), "", ()),
        (("a",), "None", ("None",)),
        ((), '(("bias", False),)', (("bias", False),)),
        ({}, '{"q_proj": 8}', {"q_proj": 8}),
        ({}, "{'q_proj': 8}", {"q_proj": 8}),
        ({}, r"{'layers\.0\.q_proj': 8}", {r"layers\.0\.q_proj": 8}),
        ({"a": 1}, "", {}),
        ({}, '{"nesterov": true, "b": [1]}', {"nesterov": True, "b": (1,)}),
    ],
)
def test_text(default, text, value):
    result = from_text("key", text, default)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("default", "text", "takes"),
    [
        (0, "1.5", "a whole number"),
        (0, "true", "a whole number"),
        (0, "inf", "a whole number"),
        (0, "", "a whole number"),
        (0.0, "nan", "a number"),
        (0.0, "1,5", "a number"),
        (False, "maybe", "true or false"),
        ((), "a,,b", "a list of values"),
        ((), '("a",', "a list of values"),
        ((), '{"a": 1}', "a list of values"),
        (("a",), "1,2", "a list of values"),
        ((), '("a", 1)', "a list of values"),
        ({}, "8", "a mapping"),
        ({}, "q_proj", "a mapping"),
    ],
)
def test_wrong_text_names_the_key_what_it_takes_and_what_was_given(default, text, takes):
    with pytest.raises(UserError) as caught:
        from_text("section.key", text, default)
    assert str(caught.value).startswith(f"config.section.key takes {takes}")
    assert str(caught.value).endswith(f", not {text!r}")


@pytest.mark.parametrize(
    ("default", "value", "expected"),
    [
        (0, 3.0, 3),
        (0, np.int64(3), 3),
        (0.0, 3, 3.0),
        (0.0, np.float32(0.5), 0.5),
        ((), ["a", ["b"]][:1], ("a",)),
    ],
)
def test_python_values(default, value, expected):
    result = from_value("key", value, default)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("default", "value"),
    [
        (0, 1.5),
        (0, True),
        (0, None),
        (0.0, float("nan")),
        (0.0, True),
        (False, 1),
        ("", 1),
        ((), "a"),
        ({}, ()),
        (0, float("inf")),
        (0.0, 10**400),
    ],
)
def test_wrong_python_values(default, value):
    with pytest.raises(UserError, match=r"config\.key takes"):
        from_value("key", value, default)


words = st.text("abcdefghij_*/0", min_size=1).filter(lambda word: not word[0].isdigit())


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_what_python_prints_is_read_as_it_was(value):
    assert from_text("key", repr(value), value) == value


@given(st.lists(words).map(tuple), st.dictionaries(words, st.integers()))
def test_containers_are_read_as_they_were(values, mapping):
    assert from_text("key", repr(values), ()) == values
    assert from_text("key", ",".join(values), ()) == values
    assert from_text("key", repr(mapping), {}) == mapping
