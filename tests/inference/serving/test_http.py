"""The server as its clients see it: every answer is that of `generate`, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.assets import model_folder
from jaxft.data.chat import encode_chat
from jaxft.data.tokenizer import load_tokenizer
from jaxft.inference.asked import Asked
from jaxft.inference.serving import http, slots
from jaxft.inference.serving.command import context_of, engine_of
from jaxft.inference.serving.http import Server
from jaxft.inference.serving.models import served
from jaxft.inference.serving.versions import Room, Spoken, Versions, bank_of
from jaxft.models import hidden_states, logits

model, params = jaxft.load("tiny")
METHODS = {
    "one": jaxft.methods.lora(rank=4),
    "two": jaxft.methods.dora(rank=2),
    "three": jaxft.methods.vera(rank=8),
}
tokenizer = load_tokenizer(model_folder("tiny"), "chatml")
PROMPTS = ["Tom has 3 apples and", "A", "She buys two pens. " * 3, "Question: five plus four"]


def adapted(method, seed):
    """The tiny model with an adapter that says something else."""
    tree = jaxft.adapt(params, method, jax.random.key(seed))
    trainable, frozen = jaxft.partition(tree, method)
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    moved = [x + 0.3 * y for x, y in zip(leaves, noise, strict=True)]
    return jaxft.combine(jax.tree.unflatten(structure, moved), frozen)


TREES = {name: adapted(method, seed) for seed, (name, method) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """All three kinds in one bank, with room for two that come later, of one folder."""
    later = tmp_path_factory.mktemp("adapters")
    jaxft.save_adapter(adapted(jaxft.methods.lora(rank=3), 7), later / "fourth")
    room = Room((str(later),), 2, 4)
    tree = bank_of(params, TREES, room)
    engine = engine_of(model.config, params, tree, slots=3, context=128, waiting=6)
    base = served("tiny", "tiny", tokenizer)
    versions = Versions(base, "tiny", Spoken("", "chatml"), room, tree)
    for index, name in enumerate(TREES):
        versions.add(name, "", index)
    engine.start()
    yield Server(engine, versions, most_bytes=5000)
    engine.stop()
    assert engine.failure is None


def asking(server, *requests, headers=None):
    """The responses to requests (path, body) that are made at once; those without a body are GETs."""

    async def all_of_them():
        transport = httpx.ASGITransport(server.application())
        async with httpx.AsyncClient(
            transport=transport, base_url="http://jaxft", headers=headers
        ) as client:
            calls = [
                client.get(path) if body is None
                else client.post(path, content=body) if isinstance(body, bytes)
                else client.post(path, json=body)
                for path, body in requests
            ]  # fmt: skip
            return await asyncio.gather(*calls)

    return asyncio.run(all_of_them())


def completion(prompt, **others):
    return "/v1/completions", {"model": "tiny", "prompt": prompt, "temperature": 0} | others


def chat(text, **others):
    messages = [{"role": "user", "content": text}]
    return "/v1/chat/completions", {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
    } | others


def said(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def generated(prompts, new=12, tree=params):
    """What `generate` says to each by itself."""
    options = {"tokenizer": tokenizer, "max_new_tokens": new}
    return [jaxft.generate(model, tree, [prompt], **options)[0] for prompt in prompts]


def test_answers_are_those_of_generate_in_any_mixture(server):
    warm = completion(PROMPTS[0], temperature=1.5, top_p=0.5, seed=3, max_tokens=12)
    requests = [completion(prompt, max_tokens=12) for prompt in PROMPTS]
    *answers, _ = asking(server, *requests, warm)
    assert [said(answer)[0] for answer in answers] == generated(PROMPTS)
    together = asking(server, completion(PROMPTS, max_tokens=12))[0]
    assert said(together) == generated(PROMPTS)
    lengths = [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    usage = together.json()["usage"]
    assert usage["prompt_tokens"] == sum(lengths)
    assert usage["completion_tokens"] == 48
    assert usage["total_tokens"] == sum(lengths) + 48
    assert {choice["finish_reason"] for choice in together.json()["choices"]} == {"length"}


def test_each_version_says_what_it_says_alone_whatever_is_beside_it(server):
    names = ["one", "tiny", "two", "three", "one"]
    answers = asking(server, *[completion(PROMPTS[0], model=name, max_tokens=12) for name in names])
    for name, answer in zip(names, answers, strict=True):
        alone = jaxft.merge(TREES[name]) if name in TREES else params
        assert said(answer) == generated(PROMPTS[:1], tree=alone)
        assert answer.json()["model"] == name
    assert len({said(answer)[0] for answer in answers}) == 4


def test_an_adapter_comes_and_goes_without_another_program(server):
    before = slots.step._cache_size()
    put = ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "fourth"})
    card, again = (asking(server, put)[0] for _ in range(2))
    assert card.json().items() >= {"id": "new", "parent": "tiny"}.items()
    assert again.status_code == 400
    folder = card.json()["root"]
    assert folder.endswith("fourth")
    answer = said(asking(server, completion(PROMPTS[0], model="new", max_tokens=12))[0])
    assert answer == generated(PROMPTS[:1], tree=jaxft.merge(jaxft.load_adapter(params, folder)))
    assert "new" in [card["id"] for card in asking(server, ("/v1/models", None))[0].json()["data"]]
    drop = ("/v1/unload_lora_adapter", {"lora_name": "new"})
    first, second = (asking(server, drop)[0].status_code for _ in range(2))
    assert (first, second) == (200, 404)
    assert asking(server, completion("a", model="new"))[0].status_code == 404
    codes = [
        asking(server, (put[0], put[1] | {"lora_name": name}))[0].status_code
        for name in ("fifth", "sixth", "seventh")
    ]
    assert codes == [200, 200, 409]
    assert slots.step._cache_size() == before
    for name in ("fifth", "sixth"):
        asking(server, (drop[0], {"lora_name": name}))


@pytest.mark.parametrize(
    ("path", "status"),
    [("..", 403), ("/", 403), ("/etc", 403), ("none", 403), ("fourth/../..", 403), ("", 400), (3, 400), ("a\0b", 400)],
)  # fmt: skip
def test_adapters_come_from_named_folders_alone(server, path, status):
    body = {"lora_name": "other", "lora_path": path}
    response = asking(server, ("/v1/load_lora_adapter", body))[0]
    assert response.status_code == status
    assert response.json()["error"]["param"] == "lora_path"


def test_the_base_is_not_taken_out(server):
    response = asking(server, ("/v1/unload_lora_adapter", {"lora_name": "tiny"}))[0]
    assert response.status_code == 404


def test_a_beginning_is_not_shared_between_versions(server):
    text = "How many wheels have nine carts of four wheels each, if two carts are broken?"
    asking(server, completion(text, max_tokens=1))
    other = asking(server, completion(text, model="one", max_tokens=1))[0].json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] <= 1  # the BOS of all prompts


def test_a_prompt_may_be_ids(server):
    ids = tokenizer.encode(PROMPTS[0])
    both = asking(server, completion(ids, max_tokens=5), completion([ids, ids[:2]], max_tokens=5))
    assert said(both[0])[0] == said(both[1])[0] == generated(PROMPTS[:1], 5)[0]


def test_a_chat_is_answered_through_the_template(server):
    messages = [{"role": "user", "content": "Hello"}]
    answer, more = asking(
        server, chat("Hello", max_tokens=6), chat("Hello", max_completion_tokens=6)
    )
    body = answer.json()
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert (
        message["content"]
        == generated([messages], 6)[0]
        == more.json()["choices"][0]["message"]["content"]
    )
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_says_the_same_in_parts(server):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8}
    text, turn, plain = asking(
        server,
        completion(PROMPTS[:2], **options),
        chat("Hello", **options),
        chat("Hello", stream=True, max_tokens=8),
    )
    parts = events(text)
    for index, want in enumerate(generated(PROMPTS[:2], 8)):
        own = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == want
        assert [choice["finish_reason"] for choice in own][-1] == "length"
        assert len(own) > 4
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 16
    assert all(part["usage"] is None for part in parts[:-1])
    turns = events(turn)
    assert turns[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    words = "".join(part["choices"][0]["delta"].get("content", "") for part in turns[:-1])
    assert words == generated([[{"role": "user", "content": "Hello"}]], 8)[0]
    assert "usage" not in events(plain)[-1]


def test_a_stream_says_the_prompt_once_where_it_is_asked(server):
    options = {"stream": True, "echo": True, "max_tokens": 3}
    for further in ({}, {"logprobs": 1}):
        parts = events(asking(server, completion(PROMPTS[0], **options, **further))[0])
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert text == PROMPTS[0] + generated(PROMPTS[:1], 12)[0][: len(text) - len(PROMPTS[0])]
        assert text != PROMPTS[0]


def log_probabilities(ids):
    """Of the next token after each of some ids: the definition."""
    hidden = hidden_states(model.config, params, jnp.asarray([ids]))
    return np.asarray(jax.nn.log_softmax(logits(model.config, params, hidden)[0]))


def test_probabilities_are_those_of_the_model_also_of_the_prompt(server):
    ids = tokenizer.encode(PROMPTS[0])
    response = asking(server, completion(ids, max_tokens=3, logprobs=2, echo=True))[0].json()
    scores = response["choices"][0]["logprobs"]
    text = response["choices"][0]["text"]
    asked = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith(asked)
    every = ids + tokenizer.encode(text[len(asked) :], add_special_tokens=False)
    want = log_probabilities(every)
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    found = scores["token_logprobs"][1:]
    assert len(found) == len(every) - 1 == len(ids) + 2
    assert found == pytest.approx([want[i, token] for i, token in enumerate(every[1:])], abs=1e-4)
    for row, top, own in zip(want, scores["top_logprobs"][1:], found, strict=False):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
        assert own in top.values()  # what was said is told too, as it stands
        assert len(top) <= 3
    assert "".join(scores["tokens"]) == text
    assert scores["text_offset"] == [len("".join(scores["tokens"][:i])) for i in range(len(every))]
    prompt_alone = asking(server, completion(ids, max_tokens=0, logprobs=1, echo=True))[0].json()
    assert (
        prompt_alone["choices"][0]["logprobs"]["token_logprobs"]
        == scores["token_logprobs"][: len(ids)]
    )
    assert prompt_alone["usage"]["completion_tokens"] == 0


def test_a_chats_probabilities_stand_beside_its_tokens(server):
    response = asking(server, chat("Hello", max_tokens=3, logprobs=True, top_logprobs=2))[0].json()
    rows = response["choices"][0]["logprobs"]["content"]
    assert len(rows) == 3
    for row in rows:
        assert row["logprob"] == row["top_logprobs"][0]["logprob"]
        assert bytes(row["bytes"]).decode() == row["token"]
        assert len(row["top_logprobs"]) == 2


def test_a_stop_ends_the_answer_and_is_no_part_of_it(server):
    whole = generated(PROMPTS[:1], 12)[0]
    stop = whole[5:8]
    response = asking(server, completion(PROMPTS[0], max_tokens=12, stop=[stop, "nowhere"]))[0]
    assert said(response)[0] == whole[: whole.index(stop)]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_the_models_own_end_ends_it(server, monkeypatch):
    ids = tokenizer.encode(PROMPTS[0])
    first = int(log_probabilities(ids)[-1].argmax())
    ending = dataclasses.replace(server.versions.base.tokenizer, eos_ids=(first,))
    monkeypatch.setitem(
        server.versions.models, "tiny", dataclasses.replace(server.versions.base, tokenizer=ending)
    )
    response = asking(server, completion(PROMPTS[0], max_tokens=12))[0].json()
    assert response["choices"][0] == {
        "index": 0,
        "finish_reason": "stop",
        "logprobs": None,
        "text": "",
    }
    assert response["usage"]["completion_tokens"] == 1
    on = asking(server, completion(PROMPTS[0], max_tokens=3, ignore_eos=True))[0].json()
    assert on["usage"]["completion_tokens"] == 3


def test_draws_depend_on_the_seed_and_not_on_the_others(server):
    draw = completion(PROMPTS[0], temperature=1.0, max_tokens=10, seed=7, n=2)
    alone = said(asking(server, draw)[0])
    among = asking(
        server, completion(PROMPTS[1], max_tokens=9), draw, completion("x", temperature=2, seed=1)
    )
    assert said(among[1]) == alone
    assert alone[0] != alone[1]
    other = said(asking(server, completion(PROMPTS[0], temperature=1.0, max_tokens=10, seed=8))[0])
    assert other[0] not in alone
    narrow = completion(PROMPTS[0], temperature=5.0, top_k=1, max_tokens=10)
    assert said(asking(server, narrow)[0]) == generated(PROMPTS[:1], 10)


def test_a_beginning_that_was_read_is_not_read_again(server):
    text = "The train leaves at nine. How many hours is it until noon? Count them slowly."
    ids = tokenizer.encode(text)
    first = asking(server, completion(text, max_tokens=4, n=3))[0].json()
    assert first["usage"]["prompt_tokens"] == len(ids)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2 * (len(ids) - 1)
    longer = asking(server, completion(text + " Then add", max_tokens=4))[0].json()
    assert longer["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(ids) - 1
    assert [choice["text"] for choice in longer["choices"]] == generated([text + " Then add"], 4)


def test_what_is_put_before_prompts_is_told_beside_the_answers(server):
    def before(prompts, room):
        assert 0 < room < 128
        return [put(prompt) for prompt in prompts.values()]

    def put(prompt):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if "unknown" in text:
            return Asked(prompt, "I do not know.", lambda _: {"refused": True, "passages": []})
        longer = "Nine carts. " + text
        told = longer if isinstance(prompt, str) else [{**prompt[-1], "content": longer}]
        return Asked(told, None, lambda answer: {"passages": ["carts"], "quotes": answer[:1]})

    informed = Server(server.engine, server.versions, before=before)
    ids = tokenizer.encode("How many?")
    text, turn, plain, mixed, parts = asking(
        informed,
        completion("How many?", max_tokens=6),
        chat("How many?", max_tokens=6),
        completion(ids, max_tokens=6),
        completion(["unknown", "How many?"], max_tokens=6),
        completion("unknown", max_tokens=6, stream=True),
    )
    want = generated(["Nine carts. How many?"], 6)
    assert said(text) == want
    choice = text.json()["choices"][0]
    assert (choice["passages"], choice["quotes"]) == (["carts"], want[0][:1])
    asked = [[{"role": "user", "content": "Nine carts. How many?"}]]
    assert turn.json()["choices"][0]["message"]["content"] == generated(asked, 6)[0]
    assert said(plain) == generated(["How many?"], 6)
    assert "passages" not in plain.json()["choices"][0]
    assert said(mixed) == ["I do not know.", *want]
    assert mixed.json()["usage"]["completion_tokens"] == 6
    last = events(parts)[-1]["choices"][0]
    assert (last["text"], last["finish_reason"], last["refused"]) == (
        "I do not know.",
        "stop",
        True,
    )


def test_models_are_listed(server):
    listing, one, none = asking(
        server, ("/v1/models", None), ("/v1/models/tiny", None), ("/v1/models/tin", None)
    )
    assert listing.json()["object"] == "list"
    assert listing.json()["data"][0] == one.json()
    assert {card["parent"] for card in listing.json()["data"][1:]} == {"tiny"}
    assert (
        one.json().items()
        >= {"id": "tiny", "object": "model", "root": "tiny", "parent": None}.items()
    )
    assert none.status_code == 404
    assert "'tiny'" in none.json()["error"]["message"]


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        (("/v1/completions", b"{"), 400, "JSON"),
        (("/v1/completions", b"x" * 6000), 413, "5,000"),
        (completion("a", model="tny"), 404, "'tiny'"),
        (completion("a" * 600, max_tokens=4), 400, "--context"),
        (completion("a", max_tokens=500), 400, "--context"),
        (completion([99_999]), 400, "99999"),
        (chat("a", messages=[{"role": "usr", "content": "a"}]), 400, "'user'"),
        (chat("a", messages=[{"role": "user"}]), 400, "content"),
        (("/v1/embeddings", {"input": "a"}), 404, "/v1/embeddings"),
        (("/v1/completions", None), 405, "GET"),
    ],
)  # fmt: skip
def test_what_is_not_answered_is_an_error_object(server, request_, status, told):
    response = asking(server, request_)[0]
    assert response.status_code == status
    assert told in response.json()["error"]["message"]


def test_a_key_is_asked_for(server):
    locked = Server(server.engine, server.versions, key="secret")
    paths = (("/v1/models", None), ("/health", None))
    without, health = asking(locked, *paths)
    assert (without.status_code, health.status_code) == (401, 200)
    assert asking(locked, *paths, headers={"Authorization": "Bearer secre"})[0].status_code == 401
    assert asking(locked, *paths, headers={"Authorization": "Bearer secret"})[0].status_code == 200


def test_more_than_may_wait_are_told_when_to_come_again(server):
    responses = asking(server, *[completion(PROMPTS[0], max_tokens=30)] * 14)
    codes = [response.status_code for response in responses]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 9
    full = responses[codes.index(429)]
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(server, stream):
    """The ASGI application itself, whose client is gone after some parts."""
    _, body = completion(PROMPTS[0], max_tokens=100, ignore_eos=True, stream=stream)
    before = server.engine.load()["tokens"]
    sent = []

    async def leave():
        gone, heard = asyncio.Event(), iter([json.dumps(body).encode()])

        async def receive():
            for part in heard:
                return {"type": "http.request", "body": part, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        if not stream:
            asyncio.get_running_loop().call_later(0.05, gone.set)
        await server.application()(scope_of("/v1/completions"), receive, send)

    asyncio.run(leave())
    until = time.monotonic() + 20
    while server.engine.load()["busy"] and time.monotonic() < until:
        time.sleep(0.01)
    assert server.engine.load()["busy"] == 0
    assert server.engine.load()["tokens"] - before < 100


def scope_of(path):
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}


def test_a_reader_that_takes_nothing_holds_up_nobody(server, monkeypatch):
    monkeypatch.setattr(http, "SEND_SECONDS", 0.2)
    _, body = completion(PROMPTS[0], max_tokens=20, ignore_eos=True, stream=True)
    stuck = []

    async def both():
        heard = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive():
            for message in heard:
                return message
            await asyncio.Event().wait()

        async def send(message):
            stuck.append(message["type"])
            await asyncio.Event().wait()

        async def read():
            transport = httpx.ASGITransport(server.application())
            async with httpx.AsyncClient(transport=transport, base_url="http://jaxft") as client:
                path, asked = completion(PROMPTS[1], max_tokens=12)
                return await client.post(path, json=asked)

        blocked = server.application()(scope_of("/v1/completions"), receive, send)
        return await asyncio.gather(read(), asyncio.wait_for(blocked, 60))

    answer, _ = asyncio.run(both())
    assert said(answer) == generated(PROMPTS[1:2])
    assert stuck == ["http.response.start"]


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.05)
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    asyncio.run(server.application()(scope_of("/v1/completions"), receive, send))
    assert sent[0]["status"] == 408


@pytest.mark.thorough
def test_a_template_that_never_ends_is_ended(server, monkeypatch):
    bomb = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
    base = server.versions.base
    slow = dataclasses.replace(base, tokenizer=dataclasses.replace(tokenizer, chat_template=bomb))
    monkeypatch.setitem(server.versions.models, "bomb", slow)
    answer, other = asking(server, chat("a", model="bomb"), completion(PROMPTS[1], max_tokens=12))
    assert answer.status_code == 400
    assert "chat template fails" in answer.json()["error"]["message"]
    assert said(other) == generated(PROMPTS[1:2])


def test_a_context_is_what_the_model_reads_at_most():
    assert context_of(model.config, 0) == min(model.config.max_length, 2048)
    assert context_of(model.config, 64) == 64
    with pytest.raises(jaxft.UserError, match="--context 1,000,000"):
        context_of(model.config, 1_000_000)
    rope = (("rope_type", "longrope"), ("original_max_position_embeddings", 32))
    assert context_of(dataclasses.replace(model.config, rope_scaling=rope), 0) == 32
