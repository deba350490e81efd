"""What `jaxft serve` runs: opens what is served, listens, and ends in order when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, counted
from jaxft.inference.asked import Before
from jaxft.inference.opening import open_words
from jaxft.inference.serving.engine import Ask, Engine
from jaxft.inference.serving.models import Served, served
from jaxft.inference.serving.versions import (
    Room,
    Spoken,
    Versions,
    adapters_of,
    bank_of,
    open_base,
    without_names,
)
from jaxft.models.block import original_length
from jaxft.models.config import Config
from jaxft.tree import PyTree
from jaxft.weights import bind_groups

ENDING_SECONDS = 5  # in which the answers are told that were not done in time
MOST_CONNECTIONS = 2048
USUAL_CONTEXT = 2048  # tokens of a sequence, where the model reads so many and none are asked for


def main(
    model: str,
    *,
    name: str,
    adapters: Sequence[str],
    adapters_from: Sequence[str],
    room: int,
    rank: int,
    host: str,
    port: int,
    api_key: str,
    slots: int,
    context: int,
    waiting: int,
    stop_within: int,
    body_bytes: int,
    tokenizer: str,
    chat_template: str,
    date: str,
    dtype: str,
    before: Callable[[Tokenizer], Before] | None = None,
) -> None:
    """Serves a model by OpenAI's protocol until SIGTERM or Ctrl-C.

    Args:
        model: a Hugging Face folder, a name of the hub, or "tiny".
        name: what requests call it; "" for `model`.
        adapters: NAME=FOLDER each, versions of it.
        adapters_from: folders below which further adapters may be, which are put in by requests.
        room: how many of these at once.
        rank: their largest.
        host: the address where it listens.
        port: likewise; 0 takes a free one.
        api_key: what clients must know; "" for nothing.
        slots: sequences at once.
        context: tokens of a sequence; 0: what the model reads, at most `USUAL_CONTEXT`.
        waiting: requests that may wait for a slot.
        stop_within: seconds that answers on their way have when it is told to stop.
        body_bytes: the most of a request.
        tokenizer: as of `open_words`, like the next two.
        chat_template: "" for the tokenizer's.
        date: "" for the present moment.
        dtype: of weights and computation.
        before: for the base's tokenizer, what puts something before the prompts of all versions.

    Raises:
        UserError: what cannot be read or listened at, or an engine that failed.
    """
    name = name or model
    own = adapters_of(adapters, name)
    later = Room(tuple(adapters_from), room if adapters_from else 0, rank)
    _check_folders(adapters_from)
    spoken = Spoken(tokenizer, chat_template, date)
    words = open_words(model, **spoken._asdict())
    put_before = before(words.tokenizer) if before is not None else None
    with _listening(host, port) as listener:
        network, params, folders = open_base(model, own, dtype)
        tree = bank_of(params, folders, later)
        versions = Versions(served(name, _root(model), words.tokenizer), model, spoken, later, tree)
        for index, (one, folder) in enumerate(folders.items()):
            versions.add(one, folder, index)
        size = context_of(network.config, context)
        sizes = {"slots": slots, "context": size, "waiting": waiting}
        engine = engine_of(network.config, params, tree, **sizes)
        engine.start()
        try:
            warm(engine, versions.base)
            listener.listen(1024)  # who connects from here on is answered
            address = _address(listener)
            print(
                f"jaxft: {', '.join(versions.models)} at {address}/v1: {counted(slots, 'slot')} of "
                f"{counted(size, 'token')}",
                file=sys.stderr,
                flush=True,
            )
            options = {"key": api_key, "most_bytes": body_bytes, "before": put_before}
            run(engine, versions, listener, options, stop_within)
        finally:
            engine.stop(stop_within)
    if engine.failure is not None:
        raise UserError(f"serve: the engine failed: {engine.failure}") from engine.failure


def engine_of(config: Config, params: PyTree, tree: PyTree | None, **sizes: Any) -> Engine:
    """The engine of a base alone, or of a bank over it."""
    if tree is None:
        return Engine(config, params, **sizes)
    return Engine(config, without_names(tree), bound=bind_groups, **sizes)


def _check_folders(folders: Sequence[str]) -> None:
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--adapters-from {folder}: no such folder")


def context_of(config: Config, asked: int) -> int:
    """How many tokens a sequence may have.

    Raises:
        UserError: more than the model reads, or than longrope turns by one kind of angles.
    """
    most = config.max_length
    if (original := original_length(config)) is not None:
        most = min(most, original)  # beyond it one row's length would change the answers of all
    if asked > most:
        raise UserError(f"--context {asked:,}: the model reads {counted(most, 'token')} here")
    return asked or min(most, USUAL_CONTEXT)


def warm(engine: Engine, model: Served) -> None:
    """Answers once, so that the first request waits for no compiler.

    Raises:
        UserError: the engine cannot: there is not enough memory, say.
    """
    done = threading.Event()
    ids = tuple(range(min(16, engine.context - 2, engine.config.vocabulary)))
    ask = Ask(ids=ids, tokenizer=model.tokenizer, limit=2)
    engine.submit([ask], [lambda piece: done.set() if piece.end else None])
    done.wait()
    if engine.failure is not None:
        reason = " ".join(str(engine.failure).split())[:300]
        raise UserError(f"serve: the engine fails at its first answer: {reason}")


def run(
    engine: Engine,
    versions: Versions,
    listener: socket.socket,
    options: Mapping[str, Any],
    stop_within: int,
) -> None:
    """Serves until a signal, or until the engine fails; `options` are those of `Server`."""
    try:
        import uvicorn

        from jaxft.inference.serving.http import Server
    except ImportError as error:
        raise UserError(f"serve needs {error.name}: pip install 'jaxft[serve]'") from None

    class Listening(uvicorn.Server):
        """uvicorn's server, for which a signal is the end and not a failure."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {
                number: signal.signal(number, self.handle_exit)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    server = Server(engine, versions, **options)
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    listening = Listening(
        uvicorn.Config(
            server.application(),
            timeout_graceful_shutdown=stop_within + ENDING_SECONDS,
            timeout_keep_alive=30,
            limit_concurrency=MOST_CONNECTIONS,
            **settings,
        )
    )

    async def serve() -> None:
        ending = asyncio.create_task(_end(engine, listening, stop_within))
        await listening.serve(sockets=[listener])
        ending.cancel()

    asyncio.run(serve())


async def _end(engine: Engine, listening: Any, stop_within: int) -> None:
    """Ends the server where the engine fails; where a signal came, ends the engine when its time is over."""
    while engine.failure is None and not listening.should_exit:
        await asyncio.sleep(0.1)
    listening.should_exit = True
    engine.close()
    await asyncio.sleep(stop_within)
    await asyncio.to_thread(engine.stop)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before anything long is done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen at {host}:{port}: {reason}") from None
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _root(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
