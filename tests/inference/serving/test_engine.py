"""The engine where nothing is computed: it is full, it is closed, it fails."""

from __future__ import annotations

import asyncio
import queue

import httpx
import pytest

import jaxft
from jaxft.assets import model_folder
from jaxft.data.tokenizer import load_tokenizer
from jaxft.errors import UserError
from jaxft.inference.serving.command import warm
from jaxft.inference.serving.engine import Ask, Engine, Full, Stopping
from jaxft.inference.serving.http import Server
from jaxft.inference.serving.models import served
from jaxft.inference.serving.versions import Versions

model, params = jaxft.load("tiny")
tokenizer = load_tokenizer(model_folder("tiny"))
ASK = Ask(ids=(1, 2, 3), tokenizer=tokenizer, limit=5)


def broken(params, adapters):
    raise MemoryError("no room")


def engine(**options):
    return Engine(model.config, params, slots=2, context=32, waiting=1, **options)


def test_no_more_wait_than_may_and_all_or_none_are_taken():
    idle, told = engine(), [print] * 4
    idle.submit([ASK, ASK], told[:2])  # not begun: they stand in the queue
    with pytest.raises(Full):
        idle.submit([ASK, ASK], told[:2])
    assert idle.load()["waiting"] == 2
    idle.submit([ASK], told[:1])
    assert idle.seconds_to_wait() >= 1


def test_what_waits_is_given_up_and_what_comes_later_is_not_taken():
    idle, came = engine(), queue.Queue()
    rows = idle.submit([ASK, ASK], [came.put] * 2)
    idle.cancel(rows[:1])
    idle.close()
    with pytest.raises(Stopping):
        idle.submit([ASK], [came.put])
    idle.stopping = True
    idle.start()
    assert [came.get(timeout=10).end for _ in rows] == ["cancelled"] * 2
    idle.stop()
    assert idle.load()["waiting"] == 0


def test_a_failure_is_told_to_all_and_ends_the_server():
    failing, came = engine(bound=broken), queue.Queue()
    rows = failing.submit([ASK, ASK], [came.put] * 2)
    failing.start()
    assert [came.get(timeout=10).end for _ in rows] == ["error"] * 2
    assert isinstance(failing.failure, MemoryError)
    with pytest.raises(Stopping):
        failing.submit([ASK], [came.put])
    server = Server(failing, Versions(served("tiny", "tiny", tokenizer)))

    async def ask():
        transport = httpx.ASGITransport(server.application())
        async with httpx.AsyncClient(transport=transport, base_url="http://jaxft") as client:
            body = {"model": "tiny", "prompt": "a"}
            return await client.post("/v1/completions", json=body), await client.get("/health")

    answer, health = asyncio.run(ask())
    assert (answer.status_code, health.status_code) == (503, 503)
    assert answer.json()["error"]["type"] == "server_error"


def test_an_engine_that_cannot_answer_is_said_before_it_listens():
    failing = engine(bound=broken)
    failing.start()
    with pytest.raises(UserError, match="fails at its first answer: no room"):
        warm(failing, served("tiny", "tiny", tokenizer))
