"""`jaxft chat`: a conversation on the terminal or through a pipe, a line in and an answer out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from jaxft.data.chat import Ending, encode_chat, end_of_turn
from jaxft.data.tokenizer import Tokenizer
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError, counted
from jaxft.inference.decoding import bucket, generate_tokens
from jaxft.inference.generate import check_settings, decoded, padded, streams_of
from jaxft.inference.opening import as_chat, open_model, open_words
from jaxft.models import Transformer
from jaxft.tree import PyTree

LEAST_LENGTH = 256  # shorter conversations share one program: none is compiled for each turn
RESET = "/reset"
GREETING = f"{RESET} begins anew, Ctrl-D ends"

Messages = list[dict[str, Any]]


def main(
    model: str,
    *,
    adapter: str = "",
    system: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    date: str = "",
    dtype: str = "float32",
    **settings: Any,
) -> None:
    """Answers each line of the standard input, with the conversation before it, until its end.

    Blank lines are passed over; /reset forgets what was said. The answers alone go to the standard output.

    Args:
        model: a Hugging Face folder, or "tiny".
        adapter: a PEFT folder; "" for none.
        system: the system's message, which stands first; "" for none.
        tokenizer: as of `open_words`, like the next three.
        chat_template: "" for the adapter's or the tokenizer's.
        date: "" for the present moment.
        dtype: of weights and computation.
        settings: as of `Conversation`.

    Raises:
        UserError: what cannot be read, no chat template, or (of a pipe) a message that is too long.
    """
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    words = open_words(model, adapter, tokenizer=tokenizer, chat_template=chat_template, date=date)
    as_chat(words, True, system)
    if words.chats is False:
        print("jaxft: it was trained on texts, and not to chat", file=sys.stderr)
    network, params = open_model(model, adapter, dtype)
    talk = Conversation(network, params, words.tokenizer, system, **settings)
    typed = sys.stdin.isatty()
    if typed:
        print(GREETING, file=sys.stderr)
    for line in _lines(typed):
        if line == RESET:
            talk.reset()
            continue
        try:
            print(talk.ask(line), flush=True)
        except UserError as error:
            if not typed:
                raise
            print(f"jaxft: {error}", file=sys.stderr)


def _lines(typed: bool) -> Iterator[str]:
    """What is asked, without blank lines; on a terminal behind a mark, with the arrows of `readline`."""
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then knows the arrows)
    while True:
        try:
            line = input("> ") if typed else next(sys.stdin)
        except (EOFError, StopIteration):
            break
        if line.strip():
            yield line.strip()
    if typed:
        print(file=sys.stderr)


class Conversation:
    """What was said so far, and a model that goes on with it.

    Args:
        model: the decoder.
        params: its tree, adapted.
        tokenizer: with the chat template.
        system: the system's message; "" for none.
        max_new_tokens: the most tokens of an answer; at most half of what the model reads.
        temperature, top_k, top_p, seed: as of `generate`, whose answers to the same messages these are.
    """

    def __init__(
        self,
        model: Transformer,
        params: PyTree,
        tokenizer: Tokenizer,
        system: str = "",
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_settings(max_new_tokens, temperature, top_k, top_p, 1)
        self.model, self.params, self.tokenizer, self.seed = model, params, tokenizer, seed
        self.limit = max(min(max_new_tokens, model.config.max_length // 2), 1)
        self.rules: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.beginning: Messages = [{"role": "system", "content": system}] if system else []
        self.ending: Ending = end_of_turn(tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages = list(self.beginning)

    def ask(self, text: str) -> str:
        """The answer to the user's next message. What is too old to be read with it is left out, and that is said.

        Raises:
            UserError: the message alone is longer than the model reads; the conversation stays as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, kept = self._fitting(asked)
        if len(kept) < len(asked):
            left = counted(len(asked) - len(kept), "message")
            print(f"jaxft: the oldest {left} no longer fit, and are forgotten", file=sys.stderr)
        answer = self._answer(ids)
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        return answer

    def _fitting(self, messages: Messages) -> tuple[list[int], Messages]:
        """The ids of the messages, and those that are left: older turns go where they are too long."""
        first = len(self.beginning)
        room = self.model.config.max_length - self.limit
        while True:
            ids = encode_chat(self.tokenizer, messages, add_generation_prompt=True)
            if len(ids) <= room:
                return ids, messages
            if len(messages) <= first + 2:
                raise UserError(
                    f"the message is too long: {counted(len(ids), 'token')}, where the model reads {room} before "
                    f"an answer of {self.limit}"
                )
            messages = messages[:first] + messages[first + 2 :]

    def _answer(self, ids: list[int]) -> str:
        tokens, segments = padded([ids], bucket(len(ids), LEAST_LENGTH))
        rows, lengths = generate_tokens(
            self.model.config,
            self.params,
            tokens,
            segments,
            jax.random.key(self.seed),
            max_new_tokens=self.limit,
            eos_ids=(*self.tokenizer.eos_ids, *self.ending.ids),
            streams=streams_of([ids]),
            **self.rules,
        )
        return decoded(self.tokenizer, rows[0, : lengths[0]].tolist(), self.ending)
