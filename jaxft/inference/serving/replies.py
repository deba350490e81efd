"""OpenAI's protocol, writing: answers whole or in parts, their probabilities, and what they took."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.data.tokenizer import Tokenizer
from jaxft.inference.serving.engine import Piece, Token
from jaxft.inference.serving.protocol import Request
from jaxft.inference.serving.text import UNFINISHED


@dataclasses.dataclass
class Choice:
    """One answer as it grows.

    Attributes:
        index: which of the request's.
        prompt: the text that stands before it, where that is asked.
        prompt_tokens: of what was read.
        text: what was said so far.
        tokens: with the prompt's before them, where that is asked.
        said: tokens that were drawn.
        cached: tokens of the prompt that had been read for others.
        end: why it ended; "" while it goes on.
        echoed: whether a stream has told the prompt.
        row: answer -> what is told beside it.
    """

    index: int
    prompt: str
    prompt_tokens: int
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    said: int = 0
    cached: int = 0
    end: str = ""
    echoed: bool = False
    row: Callable[[str], dict[str, Any]] = lambda _: {}

    def add(self, piece: Piece) -> None:
        """Takes a further part."""
        self.text += piece.text
        self.tokens += [*piece.prompt, *piece.tokens]
        self.said += len(piece.tokens)
        self.cached, self.end = piece.cached, piece.end


class Reply:
    """The answer to a request, as JSON objects.

    Args:
        request: what was asked.
        tokenizer: of the model.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request, self.tokenizer = request, tokenizer
        kind = "chatcmpl" if request.chat else "cmpl"
        self.id, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())
        self.offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice], further: Mapping[str, Any]) -> dict[str, Any]:
        """The object of an answer that comes at once."""
        written = [self._whole_choice(choice) for choice in choices]
        name = "chat.completion" if self.request.chat else "text_completion"
        return {
            **self._frame(name),
            "choices": written,
            "usage": usage(choices, self.request.n),
            **further,
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream tells of an answer before it begins."""
        if self.request.chat:
            delta = {"role": "assistant", "content": ""}
            return self._part({"index": choice.index, "delta": delta, "finish_reason": None})
        return None

    def part(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """What a stream tells of a piece; None where it tells nothing yet."""
        echoed, choice.echoed = "" if choice.echoed else choice.prompt, True
        text, tokens = echoed + piece.text, [*piece.prompt, *piece.tokens]
        if not (text or piece.end or (tokens and self.request.alternatives is not None)):
            return None
        scores = self._probabilities(choice.index, tokens)
        row = {"index": choice.index, "logprobs": scores, "finish_reason": piece.end or None}
        says = {"delta": {"content": text} if text else {}} if self.request.chat else {"text": text}
        beside = choice.row(choice.text + piece.text) if piece.end else {}
        return self._part(row | says | beside)

    def usage_part(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a stream ends with, where it was asked."""
        return self._part(None) | {"usage": usage(choices, self.request.n)}

    def _part(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.request.chat else "text_completion"
        none = {"usage": None} if self.request.usage else {}
        return {**self._frame(name), "choices": [choice] if choice else [], **none}

    def _frame(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.request.model}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        row: dict[str, Any] = {"index": choice.index, "finish_reason": choice.end}
        scores = self._probabilities(choice.index, choice.tokens)
        row |= {"logprobs": scores, **choice.row(choice.text)}
        if self.request.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return row | {"message": message}
        return row | {"text": choice.prompt + choice.text}

    def _probabilities(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        if self.request.chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets, start = [], self.offsets.get(index, 0)
        for text in texts:
            offsets.append(start)
            start += len(text)
        self.offsets[index] = start
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        """By its text, how likely each of the likeliest was, and the token itself; the likelier of one text counts."""
        if token.log_probability is None:
            return None
        wanted = token.likeliest[: self.request.alternatives]
        found: dict[str, float] = {}
        for number, log in [*wanted, (token.id, token.log_probability)]:
            text = self._text(number)
            found[text] = max(log, found.get(text, log))
        return found

    def _chat_token(self, token: Token) -> dict[str, Any]:
        wanted = token.likeliest[: self.request.alternatives]
        log = token.log_probability
        return self._named(token.id, log) | {"top_logprobs": [self._named(*one) for one in wanted]}

    def _named(self, number: int, log: float | None) -> dict[str, Any]:
        text = self._text(number)
        known = list(text.encode()) if UNFINISHED not in text else None
        return {"token": text, "logprob": log, "bytes": known}

    def _text(self, number: int) -> str:
        return self.tokenizer.decode([number], skip_special_tokens=False)


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """What the answers took, of which n are to each prompt."""
    asked = sum(choice.prompt_tokens for choice in choices[::n])
    said = sum(choice.said for choice in choices)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in choices)},
    }
