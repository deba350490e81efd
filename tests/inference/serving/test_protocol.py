"""Bodies are read as OpenAI means them, and what is wrong with one is said in an error object."""

from __future__ import annotations

import json

import pytest

from jaxft.inference.serving.protocol import Refused, read_chat, read_completion, read_json

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": "m", "prompt": "Hello"}


def refused(read, body):
    with pytest.raises(Refused) as caught:
        read(body)
    error = caught.value.body()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_a_list_of_either(prompt, read):
    assert read_completion({"model": "m", "prompt": prompt}).prompts == read


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], 1, [1, "a"], [True], {"text": "a"}, [[1, None]]]
)
def test_any_other_prompt_is_refused(prompt):
    assert refused(read_completion, {"model": "m", "prompt": prompt})["param"] == "prompt"


def test_defaults_are_the_protocols():
    text, chat = read_completion(TEXT), read_chat(HELLO)
    assert (text.limit, text.temperature, text.top_p, text.n, text.alternatives) == (
        16,
        1.0,
        1.0,
        1,
        None,
    )
    assert (chat.limit, chat.temperature, chat.alternatives, chat.chat) == (None, 1.0, None, True)
    nulls = dict.fromkeys(
        ("n", "stream", "stop", "seed", "max_tokens", "temperature", "top_p", "logprobs")
    )
    assert read_completion(TEXT | nulls) == text
    assert read_chat(HELLO | nulls) == chat


def test_probabilities_are_asked_otherwise_of_a_chat():
    assert read_completion(TEXT | {"logprobs": 0}).alternatives == 0
    assert read_completion(TEXT | {"logprobs": 5}).alternatives == 5
    assert read_chat(HELLO | {"logprobs": True, "top_logprobs": 3}).alternatives == 3
    assert read_chat(HELLO | {"logprobs": True}).alternatives == 0
    assert refused(read_chat, HELLO | {"top_logprobs": 3})["param"] == "top_logprobs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", "2"), ("n", 1.5), ("max_tokens", -1), ("temperature", -0.1),
        ("temperature", "hot"), ("temperature", True), ("top_p", 1.1), ("top_k", -2), ("stop", [1]), ("stop", 5),
        ("stop", ["a"] * 17), ("seed", "x"), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("logprobs", 21), ("echo", 1), ("best_of", 3), ("model", None), ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5), ("suffix", "x"), ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
    ],
)  # fmt: skip
def test_what_is_out_of_range_or_not_served_is_named(name, value):
    assert refused(read_completion, TEXT | {name: value})["param"] == name


def test_what_asks_for_nothing_is_taken():
    idle = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "user": "me",
    }
    assert read_completion(TEXT | idle) == read_completion(TEXT)
    assert read_chat(HELLO | {"response_format": {"type": "text"}, "store": False}) == read_chat(
        HELLO
    )


def test_an_unknown_key_is_refused_with_the_nearest():
    assert "'max_tokens'" in refused(read_completion, TEXT | {"max_tokns": 3})["message"]
    assert "'temperature'" in refused(read_chat, HELLO | {"temprature": 0})["message"]


@pytest.mark.parametrize("messages", [None, [], "Hello", ["Hello"], {"role": "user"}])
def test_messages_are_a_list_of_objects(messages):
    assert "messages" in refused(read_chat, {"model": "m", "messages": messages})["param"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_of_json_is_refused(body):
    refused(read_json, body)


def test_a_body_is_read():
    value = {"a": ["ä", "😀", 1.5, None]}
    assert read_json(json.dumps(value).encode()) == value
