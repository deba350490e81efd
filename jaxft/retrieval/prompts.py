"""What is put before a question: passages of an index, through a template, cut to a budget, and cited.

A passage is data. The template's own fields are filled once, and nothing in a passage is looked at: `{question}`,
`{{ }}` or `{% %}` in a document are the letters that they are, and `<|im_end|>` is no special token (`data.literal`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.literal import literal
from jaxft.data.tokenizer import Tokenizer
from jaxft.defaults import PASSAGES
from jaxft.errors import UserError, nearest
from jaxft.inference.asked import Asked, Prompt
from jaxft.retrieval.documents import byte_offsets
from jaxft.retrieval.index import Index, Passage, open_index
from jaxft.retrieval.quotes import quotes_of
from jaxft.runtime.untrusted import read_text

TEMPLATE = """\
Answer the question from these passages.

{passages}

Question: {question}"""
PASSAGE = "[{number}] {text}"
FIELD = re.compile(r"\{(\w+)\}")
BUDGET = 1024  # tokens of passages, template and question, where the model reads as many
FEWEST = 16  # tokens of a passage that is cut: of less nothing is put
REFUSAL = "The documents do not answer this."


@dataclasses.dataclass(frozen=True)
class Retriever:
    """An index, and how its passages are put before a question.

    Attributes:
      index: where passages are looked for.
      tokenizer: the model's, by whose tokens the budget is kept.
      passages: how many, at most.
      budget: tokens of all that is put into the prompt, question included; 0: 1024.
      template: with {passages} and {question}.
      how: as of `Index.search`.
      refuse: whether questions below the index's threshold are refused.
    """

    index: Index
    tokenizer: Tokenizer
    passages: int = PASSAGES
    budget: int = 0
    template: str = TEMPLATE
    how: str = "auto"
    refuse: bool = False

    def ask(self, prompts: Mapping[str, Prompt], room: int) -> list[Asked]:
        """What is asked instead of each prompt, and what its row tells besides.

        Args:
          prompts: texts or conversations, whose last message is the question, by the name that an error gives them.
          room: tokens that the model reads of a prompt, at most.

        Raises:
          UserError: a prompt without a question, or a question that is longer than the budget.
        """
        questions = [question_of(origin, prompt) for origin, prompt in prompts.items()]
        found = self.index.passages(self.index.search(questions, self.passages, self.how))
        asked = []
        for (origin, prompt), question, passages in zip(
            prompts.items(), questions, found, strict=True
        ):
            if self.refuse and not self.is_answered(question):
                asked.append(Asked(prompt, REFUSAL, lambda _: {"refused": True, "passages": []}))
                continue
            text, fitting = self.put(origin, question, passages, room)
            asked.append(Asked(with_question(prompt, text), None, _Cited(tuple(fitting)).row))
        return asked

    def is_answered(self, question: str) -> bool:
        """Whether the index's confidence reaches its threshold."""
        threshold = self.index.threshold
        return threshold is None or self.index.confidence(question) >= threshold

    def put(
        self, origin: str, question: str, passages: Sequence[Passage], room: int
    ) -> tuple[str, list[Passage]]:
        """The question with passages before it, and those of them that fit the budget, the last perhaps cut.

        Raises:
          UserError: the question alone, in the template, is longer.
        """
        budget = min(self.budget or BUDGET, room)
        left = budget - self._count(filled(self.template, passages="", question=question))
        if left < 0:
            what = "the model's room for a prompt" if budget == room else "the budget"
            raise UserError(
                f"{origin}: the question is longer than {what}: {budget - left:,} tokens with its template, of "
                f"{budget:,} (--budget)"
            )
        fitting: list[Passage] = []
        lines: list[str] = []
        for passage in passages:
            line = self._line(len(fitting) + 1, passage)
            tokens = self._count(line + "\n\n")
            if tokens > left:
                beside = tokens - self._count(literal(passage.text, self.tokenizer))
                passage = self._shortened(passage, left - beside)
                if not passage.text:
                    break
                line = self._line(len(fitting) + 1, passage)
                tokens = left
            fitting.append(passage)
            lines.append(line)
            left -= tokens
        return filled(self.template, passages="\n\n".join(lines), question=question), fitting

    def _line(self, number: int, passage: Passage) -> str:
        text = f"{passage.heading}\n{passage.text}" if passage.heading else passage.text
        return filled(PASSAGE, number=str(number), text=literal(text, self.tokenizer))

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _shortened(self, passage: Passage, tokens: int) -> Passage:
        """The passage's beginning, of so many tokens; one without text where these are too few."""
        if tokens < FEWEST:
            return dataclasses.replace(passage, text="", end=passage.start, tokens=0)
        offsets = self.tokenizer.backend.encode(passage.text, add_special_tokens=False).offsets
        end = offsets[min(tokens, len(offsets)) - 1][1]
        text = passage.text[:end]
        cut = text.rpartition(" ")[0].rstrip() or text
        while cut and self._count(literal(cut, self.tokenizer)) > tokens:
            cut = cut[: -max(len(cut) // 8, 1)].rstrip()
        plain = passage.end - passage.start == len(
            passage.text.encode()
        )  # the bytes are the text's
        last = passage.start + int(byte_offsets(cut)[-1]) if plain else passage.end
        return dataclasses.replace(passage, text=cut, end=last, tokens=tokens)


@dataclasses.dataclass(frozen=True)
class _Cited:
    """The passages of a prompt."""

    passages: tuple[Passage, ...]

    def row(self, answer: str) -> dict[str, Any]:
        """What an answer's row tells of them: each with its source and bytes, and which of them it quotes."""
        listed = [
            {
                "passage": number,
                "source": passage.source,
                "start": passage.start,
                "end": passage.end,
                "score": round(passage.score, 6),
                "text": passage.text,
            }
            for number, passage in enumerate(self.passages, start=1)
        ]
        return {
            "refused": False,
            "passages": listed,
            "quotes": quotes_of(answer, [passage.text for passage in self.passages]),
        }


def open_retriever(
    name: str,
    tokenizer: Tokenizer,
    *,
    passages: int = PASSAGES,
    budget: int = 0,
    template: str = "",
    how: str = "auto",
    refuse: bool = False,
) -> Retriever:
    """The index in a folder, for a model with this tokenizer; arguments as of `Retriever`.

    Raises:
      UserError: as of `open_index` and `read_template`, or `refuse` where the index has no threshold.
    """
    index = open_index(name)
    if refuse and index.threshold is None:
        raise UserError(
            f"{name}: has no threshold below which a question is refused: jaxft index --calibrate QUESTIONS "
            f"--output {name} sets one"
        )
    chosen = read_template(template)
    return Retriever(index, tokenizer, passages, budget, chosen, how, refuse)


def read_template(given: str) -> str:
    """A template: what is written, or what the file holds; the default for "".

    Raises:
      UserError: it lacks {passages} or {question}, or has another field.
    """
    if not given:
        return TEMPLATE
    written = "{" in given or "\n" in given
    text = given if written else read_text(Path(given))
    fields = FIELD.findall(text)
    for needed in ("passages", "question"):
        if needed not in fields:
            close = nearest(needed, fields) if fields else ""
            where = "" if written else f" {given}:"
            raise UserError(f"the template:{where} has no {{{needed}}}{close}")
    return text


def filled(template: str, **values: str) -> str:
    """The template with its fields filled, once: what is filled in is not looked at.

    >>> filled("{a} and {b} {c}", a="{b}", b="2")
    '{b} and 2 {c}'
    """
    return FIELD.sub(lambda found: values.get(found[1], found[0]), template)


def question_of(origin: str, prompt: Prompt) -> str:
    """What a prompt asks: the text, or the last message, which is the user's.

    Raises:
      UserError: the last message is another's, or is no text.
    """
    if isinstance(prompt, str):
        question = prompt
    else:
        last = prompt[-1] if prompt else {}
        question = last.get("content")  # type: ignore[assignment]
        if last.get("role") != "user" or not isinstance(question, str):
            raise UserError(
                f"{origin}: passages are put before the text of a user, and the last message is none"
            )
    if not question.strip():
        raise UserError(f"{origin}: there is no question")
    return question


def with_question(prompt: Prompt, text: str) -> Prompt:
    """The prompt with this text as its question."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
