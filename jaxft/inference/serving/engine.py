"""The engine: a thread that reads prompts into slots, draws tokens for all of them at once, and tells what was said.

What waits is taken in turn as slots become free. A long prompt is read in chunks between the others' tokens. A slot
keeps its sequence when it is free again: a prompt that begins as one that is there, under the same adapter, is read
from where they part.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data.tokenizer import Tokenizer
from jaxft.inference.decoding import CHUNK, LEAST_LENGTH, bucket
from jaxft.inference.serving.slots import Cache, Drawn, Params, Rows, Rules, copy, read, step
from jaxft.inference.serving.text import Text
from jaxft.models.config import Config
from jaxft.models.transformer import empty_cache
from jaxft.sequences import common_prefix_length

LEAST_POSITIONS = 256  # of the cache that are read
LEAST_SHARED = 16  # tokens for which a slot is copied
MOST_ENDS = 8  # ids that end a row inside of the program; the host looks at all of them
COUNTED = ("rows", "tokens", "prompt_tokens", "cached_tokens")
ALTERNATIVES = 20  # likeliest tokens that are told where probabilities are


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a row is asked.

    Attributes:
        ids: of the prompt, one or more.
        tokenizer: by which its tokens are text.
        adapter: its index in the bank; -1 for none.
        version: tells adapters apart that had one index after each other.
        limit: of new tokens; 0: only the prompt is read.
        temperature, top_k, top_p: as of `generate`.
        seed, stream: of the draws.
        ends: the ids after which it ends.
        stops: texts before which it ends.
        probabilities: whether they are told, of the prompt's tokens too if `scored`.
        scored: whether the prompt's tokens are told.
    """

    ids: tuple[int, ...]
    tokenizer: Tokenizer
    limit: int
    adapter: int = -1
    version: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0
    ends: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    probabilities: bool = False
    scored: bool = False


class Token(NamedTuple):
    """A token that was said or asked.

    Attributes:
        id: which.
        log_probability: None where nothing stands before it.
        likeliest: (id, log-probability) of the likeliest ones.
    """

    id: int
    log_probability: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        text: what is said further.
        tokens: which tokens were drawn since the last piece.
        prompt: what is known of the prompt's tokens, once, where that was asked.
        end: "" while it goes on; "stop", "length", "cancelled", or "error".
        cached: tokens of the prompt that stood in a slot already.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    end: str = ""
    cached: int = 0


class Full(Exception):
    """As many rows wait as may."""


class Stopping(Exception):
    """The engine takes nothing any more."""


class Row:
    """An ask on its way through the engine. `tell` is called in the engine's thread with each piece."""

    def __init__(self, ask: Ask, tell: Callable[[Piece], None]) -> None:
        self.ask, self.tell = ask, tell
        self.text = Text(ask.tokenizer, ask.stops)
        self.said: list[int] = []
        self.scores: list[Token] = [Token(ask.ids[0])] if ask.scored else []
        self.done = self.cancelled = False
        self.cached = 0

    def take(self, tokens: Sequence[Token]) -> None:
        """Tells the next tokens; sets `done` where one of them ends the row."""
        text, end, taken = "", "", list[Token]()
        for token in tokens:
            self.said.append(token.id)
            taken.append(token)
            if token.id in self.ask.ends:
                end = "stop"
            else:
                text += self.text.add(token.id)
                end = "stop" if self.text.stopped else ""
            if end or len(self.said) >= self.ask.limit:
                end = end or "length"
                text += self.text.rest()
                break
        if self.text.stopped:
            end = "stop"
        self.finish(end, text, taken) if end else self.tell(Piece(text, tuple(taken)))

    def finish(self, end: str, text: str = "", tokens: Sequence[Token] = ()) -> None:
        """Tells the last piece, once."""
        if not self.done:
            self.done = True
            self.tell(Piece(text, tuple(tokens), end=end, cached=self.cached))


class Slot:
    """What a slot of the cache holds, and whose it is.

    Attributes:
        row: who has it; None: it is free.
        held: the ids that stand in it.
        owner: under which adapter they were read.
        used: when it was given to a row or left by one.
    """

    def __init__(self) -> None:
        self.row: Row | None = None
        self.held: list[int] = []
        self.owner: tuple[int, int] = (0, 0)
        self.used = 0.0


class Engine:
    """Answers many asks at once; see the module.

    Args:
        config: the decoder's shape.
        params: its tree.
        slots: sequences at once.
        context: tokens of a sequence, prompt and answer together.
        waiting: asks that may wait.
        steps: tokens of each slot between looks at what came.
        bound: as of `slots.step`; must be the same object at each call.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        *,
        slots: int,
        context: int,
        waiting: int,
        steps: int = 1,
        bound: Callable[..., Params] = lambda params, adapters: params,
    ) -> None:
        self.config, self.params, self.context, self.waiting = (
            config,
            _placed(params),
            context,
            waiting,
        )
        self.steps, self.bound = steps, bound
        self.cache: Cache = empty_cache(config, slots, context)
        self.slots = [Slot() for _ in range(slots)]
        self.queue = collections.deque[Row]()
        self.reading: Slot | None = None
        self.lock = threading.Condition()
        self.closed = self.stopping = False
        self.failure: BaseException | None = None
        self.seconds = 1.0  # that a row has a slot, on average
        self.counts = collections.Counter(dict.fromkeys(COUNTED, 0))
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self.thread.start()

    def submit(self, asks: Sequence[Ask], tells: Sequence[Callable[[Piece], None]]) -> list[Row]:
        """Takes asks, all or none. Thread-safe, as `cancel` and `stop` are.

        Raises:
            Full: more would wait than may.
            Stopping: nothing is taken any more.
        """
        rows = [Row(ask, tell) for ask, tell in zip(asks, tells, strict=True)]
        with self.lock:
            if self.closed or self.stopping or self.failure is not None:
                raise Stopping
            free = sum(slot.row is None for slot in self.slots)
            if len(self.queue) + len(rows) > self.waiting + free:
                raise Full
            self.queue.extend(rows)
            self.counts["rows"] += len(rows)
            self.lock.notify()
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Gives up rows: their slots are free before the next token."""
        with self.lock:
            for row in rows:
                row.cancelled = True
            self.lock.notify()

    def close(self) -> None:
        """Takes nothing any more; what is on its way goes on."""
        with self.lock:
            self.closed = True

    def stop(self, timeout: float | None = None) -> None:
        """Takes nothing any more, ends what is on its way as cancelled, and waits for the thread."""
        with self.lock:
            self.stopping = True
            self.lock.notify()
        if self.thread.ident is not None:
            self.thread.join(timeout)

    def seconds_to_wait(self) -> int:
        """About how long what waits now will take to get a slot, 1 second or more."""
        with self.lock:
            turns = (len(self.queue) + 1) / len(self.slots)
        return min(max(round(turns * self.seconds), 1), 60)

    def load(self) -> dict[str, int]:
        """How many slots are busy, how many asks wait, and what was counted."""
        with self.lock:
            busy = sum(slot.row is not None for slot in self.slots)
            return {"busy": busy, "waiting": len(self.queue), **self.counts}

    def reads(self, adapter: int) -> bool:
        """Whether a row of this adapter is on its way."""
        with self.lock:
            rows = [*self.queue, *(slot.row for slot in self.slots)]
            return any(row is not None and row.ask.adapter == adapter for row in rows)

    def exchange(self, params: Params) -> None:
        """Takes other parameters of the same structure from the next token on."""
        with self.lock:
            self.params = _placed(params)

    def _run(self) -> None:
        try:
            while self._look():
                self._read_some()
                self._draw()
        except BaseException as error:
            self.failure = error
        with self.lock:
            rows = [*self.queue, *(slot.row for slot in self.slots if slot.row is not None)]
            self.queue.clear()
        for row in rows:
            row.finish("error" if self.failure is not None else "cancelled")

    def _look(self) -> bool:
        """Waits until there is work; frees what was given up. False once it is to stop."""
        with self.lock:
            while not (self.stopping or self.queue or any(slot.row for slot in self.slots)):
                self.lock.wait()
            given_up = [row for row in self.queue if row.cancelled]
            self.queue = collections.deque(row for row in self.queue if not row.cancelled)
            leaving = [slot for slot in self.slots if slot.row is not None and slot.row.cancelled]
            given_up += [slot.row for slot in leaving if slot.row is not None]
            for slot in leaving:
                self._free(slot)
        for row in given_up:
            row.finish("cancelled")
        return not self.stopping

    def _free(self, slot: Slot) -> None:
        now = time.monotonic()
        self.seconds += 0.1 * (now - slot.used - self.seconds)
        slot.row, slot.used = None, now
        if self.reading is slot:
            self.reading = None

    def _read_some(self) -> None:
        """Reads prompts, no more than a chunk's worth of tokens, so that the others do not wait for long."""
        budget = CHUNK
        while budget > 0 and (self.reading is not None or self._admit()):
            slot = self.reading
            assert slot is not None
            assert slot.row is not None
            budget -= self._read_chunk(slot, slot.row)

    def _admit(self) -> bool:
        """Gives the next ask a slot, with as much of its prompt as stands in one already."""
        with self.lock:
            free = [slot for slot in self.slots if slot.row is None]
            if not free or not self.queue:
                return False
            row = self.queue.popleft()
            ask, owner = row.ask, (row.ask.adapter, row.ask.version)
            best, shared = self._nearest(ask, owner)
            slot = min(free, key=lambda slot: (bool(slot.held), slot.used))
            if shared < LEAST_SHARED and best not in free:
                shared = 0
            if best in free and shared >= min(LEAST_SHARED, len(best.held)):
                slot = best
            slot.row, self.reading, row.cached = row, slot, shared
            slot.used = time.monotonic()
        if shared and best is not slot:
            self.cache = copy(
                self.cache, *_integers(self._number(best), self._number(slot), shared)
            )
        slot.held, slot.owner = list(ask.ids[:shared]), owner
        self.counts["prompt_tokens"] += len(ask.ids)
        self.counts["cached_tokens"] += shared
        return True

    def _nearest(self, ask: Ask, owner: tuple[int, int]) -> tuple[Slot, int]:
        """The slot with the longest beginning of a prompt, and how long; all but its last token counts."""
        if ask.scored:  # the probabilities of all its tokens are asked
            return self.slots[0], 0
        asked = ask.ids[:-1]
        lengths = [
            common_prefix_length(asked, tuple(slot.held[: len(asked)]))
            if slot.owner == owner
            else 0
            for slot in self.slots
        ]
        shared = max(lengths)
        return self.slots[lengths.index(shared)], shared

    def _number(self, slot: Slot) -> int:
        return next(number for number, other in enumerate(self.slots) if other is slot)

    def _read_chunk(self, slot: Slot, row: Row) -> int:
        """Reads the next tokens of a prompt, all but its last; returns for how many there was room."""
        ids, start = row.ask.ids, len(slot.held)
        part = ids[start : len(ids) - 1][:CHUNK]
        room = min(bucket(max(len(part), 1), LEAST_LENGTH), CHUNK)
        if part:
            padded = np.zeros((2, room), np.int32)
            padded[0, : len(part)] = part
            padded[1, : len(part)] = ids[start + 1 : start + 1 + len(part)]
            number, adapter, begin, count = _integers(
                self._number(slot), row.ask.adapter, start, len(part)
            )
            self.cache, told = read(
                self.config,
                self.params,
                self.cache,
                number,
                adapter,
                begin,
                padded[0],
                count,
                padded[1],
                bound=self.bound,
                most=self._most(start + room),
                alternatives=ALTERNATIVES if row.ask.scored else 0,
            )
            slot.held += part
            if row.ask.scored:
                row.scores += _tokens(told, np.s_[: len(part)])
        if len(slot.held) >= len(ids) - 1:
            self.reading = None
            self._begin(slot, row)
        return room

    def _begin(self, slot: Slot, row: Row) -> None:
        """The prompt is read: what is known of it is told, and the first token is drawn next."""
        if row.ask.scored:
            row.tell(Piece(prompt=tuple(row.scores)))
            row.scores = []
        if row.ask.limit == 0:
            row.finish("length")
            with self.lock:
                self._free(slot)

    def _most(self, positions: int) -> int:
        return min(bucket(positions, LEAST_POSITIONS), self.context)

    def _draw(self) -> None:
        """The next tokens of all slots whose prompts are read."""
        going = [
            (number, slot, slot.row)
            for number, slot in enumerate(self.slots)
            if slot.row is not None and slot is not self.reading
        ]
        if not going:
            return
        rows, rules = self._state(going)
        told = any(row.ask.probabilities for _, _, row in going)
        self.cache, drawn = step(
            self.config,
            self.params,
            self.cache,
            rows,
            rules,
            bound=self.bound,
            steps=self.steps,
            most=self._most(int(rows.positions.max()) + self.steps),
            alternatives=ALTERNATIVES if told else 0,
        )
        drawn = jax.tree.map(np.asarray, drawn)
        left = []
        for number, slot, row in going:
            count = int((drawn.ids[:, number] >= 0).sum())
            tokens = _tokens(drawn, np.s_[:count, number])
            last = row.said[-1] if row.said else row.ask.ids[-1]
            slot.held += [last, *(token.id for token in tokens[:-1])]
            row.take(tokens)
            self.counts["tokens"] += count
            left += [slot] if row.done else []
        with self.lock:
            for slot in left:
                self._free(slot)

    def _state(self, going: Sequence[tuple[int, Slot, Row]]) -> tuple[Rows, Rules]:
        """What the program is told of the slots; those that are not going have nothing left to draw."""
        size = len(self.slots)
        rows: Any = Rows(*np.zeros((5, size), np.int32))
        rows.adapters[:] = -1
        real, whole = np.zeros((2, size), np.float32), np.zeros((2, size), np.uint32)
        top_k, ends = np.zeros(size, np.int32), np.full((size, MOST_ENDS), -1, np.int32)
        for number, slot, row in going:
            ask = row.ask
            rows.tokens[number] = row.said[-1] if row.said else ask.ids[-1]
            rows.positions[number] = len(slot.held)
            rows.drawn[number] = len(row.said)
            rows.left[number] = ask.limit - len(row.said)
            rows.adapters[number] = ask.adapter
            real[:, number] = ask.temperature, ask.top_p
            whole[:, number] = ask.seed % 2**32, ask.stream
            top_k[number] = ask.top_k
            few = ask.ends[:MOST_ENDS]
            ends[number, : len(few)] = few
        rules: Any = (real[0], top_k, real[1], whole[0], whole[1], ends)
        return rows, Rules(*rules)


def _placed(params: Params) -> Params:
    """The arrays told to stay where they are: for those that may still move, jit would make another program."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), params)


def _integers(*values: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(value, jnp.int32) for value in values)


def _tokens(told: Drawn, part: Any) -> list[Token]:
    """What is known of some tokens, on the host."""
    ids = np.asarray(told.ids)[part].tolist()
    if told.log_probability is None:
        return [Token(token) for token in ids]
    own, likeliest, logs = (
        np.asarray(x)[part].tolist()
        for x in (told.log_probability, told.likeliest, told.log_probabilities)
    )
    return [
        Token(token, log, tuple(zip(names, values, strict=True)))
        for token, log, names, values in zip(ids, own, likeliest, logs, strict=True)
    ]
