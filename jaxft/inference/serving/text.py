"""The text of an answer while its tokens come: what of it is sure, and where a stop ends it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxft.data.tokenizer import Tokenizer

UNFINISHED = "�"  # how a decoder writes a character of which a byte is missing


class Text:
    """The text of an answer, token by token, up to the first of some stops.

    Put end to end, what `add` and `rest` give is what the tokenizer decodes of all tokens, cut before the first stop.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer, and are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.before = self.told = 0  # ids whose text helps to decode, and ids whose text is known
        self.held = ""  # what may be the beginning of a stop
        self.stopped = False

    def add(self, token: int) -> str:
        """What the next token makes sure of the text; "" while a character or a stop may go on."""
        self.ids.append(token)
        return self._past_stops(self._new(last=False), last=False)

    def rest(self) -> str:
        """What is left once no token comes any more."""
        return self._past_stops(self._new(last=True), last=True)

    def _new(self, last: bool) -> str:
        """The text of tokens that was not known before: a few before them are decoded too, for the spaces between."""
        known = self.tokenizer.decode(self.ids[self.before : self.told])
        whole = self.tokenizer.decode(self.ids[self.before :])
        if len(whole) <= len(known) or (whole.endswith(UNFINISHED) and not last):
            return ""
        self.before, self.told = self.told, len(self.ids)
        return whole[len(known) :]

    def _past_stops(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_begun(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text begin a stop.

    >>> _begun("so </", "</s>"), _begun("so", "</s>")
    (2, 0)
    """
    most = min(len(stop) - 1, len(text))
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
