"""Documents to chunks: cut between sections and sentences, by a model's own tokens, with the bytes that each covers."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

from jaxft.data.literal import literal
from jaxft.data.tokenizer import Tokenizer, refusing_panics
from jaxft.errors import UserError
from jaxft.retrieval.documents import Document

# A heading of Markdown, of either kind; a line of one to six marks, or one that is underlined.
HEADING = re.compile(
    r"^(?:#{1,6}[ \t]+\S[^\n]*|[^\s#>*-][^\n]*\n(?:=+|-{3,})[ \t]*)$", re.MULTILINE
)
# Where a sentence ends: a blank line; or a full stop, with what closes it, before white space; or a CJK full stop.
SENTENCE = re.compile(
    r"\n[ \t]*\n\s*|(?<=[.!?])[\"'\u201d\u2019)\]]*\s+|(?<=[\u3002\uff01\uff1f])[\u201d\u300d\u300f]*\s*"
)
SHORTEST = 8  # tokens of a chunk, at least: what is asked for below is refused
LETTERS = 16  # of a token, at most, where a long sentence is looked at


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a document.

    Attributes:
      source: the document's.
      start, end: the bytes of the source that it covers.
      text: what it says. Of plain text and Markdown these bytes decoded, of HTML what is read of them.
      heading: the heading of its section, "" for none, or where the chunk begins with it.
      tokens: of the text alone, without special tokens.
    """

    source: str
    start: int
    end: int
    text: str
    heading: str
    tokens: int

    @property
    def key(self) -> int:
        """A number of 63 bits that is this chunk's: of its source, of where it begins and of what it says."""
        told = f"{self.source}\0{self.start}\0{self.end}\0{self.heading}\0{self.text}".encode()
        return int.from_bytes(hashlib.sha256(told).digest()[:8], "little") >> 1


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Characters [start, end) of a document, which are not cut: a sentence with what follows it, or a part of one."""

    start: int
    end: int
    tokens: int
    section: int


def cut(document: Document, tokenizer: Tokenizer, most: int = 128, overlap: int = 0) -> list[Chunk]:
    """The chunks of a document.

    A section's sentences are put together until the next would make more than `most` tokens. A sentence that alone
    has more is cut at white space, a word that has more between two tokens.

    Args:
      document: what is cut.
      tokenizer: the model's: its tokens are counted, special ones as the text that they are.
      most: tokens of a chunk, at most.
      overlap: tokens of the last sentences of a chunk that the next one of its section begins with, at most.

    Raises:
      UserError: `most` is below 8, or `overlap` not below half of it.
    """
    if most < SHORTEST:
        raise UserError(f"chunks of {most} tokens are too short: {SHORTEST} or more")
    if not 0 <= overlap <= most // 2:
        raise UserError(f"chunks of {most} tokens overlap by 0 to {most // 2}, not {overlap}")
    text = document.text
    sections = _sections(text)
    pieces = _pieces(text, sections, tokenizer, most)
    spans = list(_spans(pieces, most, overlap))
    edges = [_stripped(text, first.start, last.end) for first, last in spans]
    counts = count_tokens(tokenizer, [text[start:end] for start, end in edges])
    chunks = []
    for (first, _), (start, end), tokens in zip(spans, edges, counts, strict=True):
        begins, _, heading = sections[first.section]
        chunks.append(
            Chunk(
                source=document.source,
                start=int(document.starts[start]),
                end=int(document.ends[end - 1]),
                text=text[start:end],
                heading="" if first.start == begins else heading,
                tokens=tokens,
            )
        )
    return chunks


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The tokens of each text, without special ones that are added."""
    plain = [literal(text, tokenizer) for text in texts]
    return [len(ids) for ids in tokenizer.encode_all(plain, add_special_tokens=False)]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _sections(text: str) -> list[tuple[int, int, str]]:
    """(start, end, heading) of each section. What stands before the first heading has none.

    A heading with nothing below it stands in the section that follows.
    """
    found = list(HEADING.finditer(text))
    edges = [0, *(match.start() for match in found), len(text)]
    bodies = [0, *(match.end() for match in found)]
    names = ["", *(_words_of(match[0]) for match in found)]
    sections, begins = [], 0
    for (start, end), body, name in zip(itertools.pairwise(edges), bodies, names, strict=True):
        if text[body:end].strip() or (end == len(text) and text[begins:end].strip()):
            sections.append((begins if text[begins:start].strip() else start, end, name))
            begins = end
    return sections


def _words_of(heading: str) -> str:
    """A heading without its marks.

    >>> _words_of("## The valve ##"), _words_of("The valve")
    ('The valve', 'The valve')
    """
    return heading.partition("\n")[0].strip().lstrip("#").rstrip("#").strip()[:200]


def _pieces(
    text: str, sections: Sequence[tuple[int, int, str]], tokenizer: Tokenizer, most: int
) -> list[_Piece]:
    spans = [
        (start, end, number)
        for number, (first, last, _) in enumerate(sections)
        for start, end in _sentences(text, first, last)
    ]
    counts = count_tokens(tokenizer, [text[start:end] for start, end, _ in spans])
    pieces = []
    for (start, end, section), tokens in zip(spans, counts, strict=True):
        if tokens <= most:
            pieces.append(_Piece(start, end, tokens, section))
        else:
            parts = _cut_sentence(text, start, end, tokenizer, most)
            pieces += [_Piece(*part, section) for part in parts if text[slice(*part[:2])].strip()]
    return pieces


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the (start, end) of each sentence, with the white space behind it."""
    at = start
    for match in SENTENCE.finditer(text, start, end):
        if match.end() > at and text[at : match.end()].strip():
            yield at, match.end()
            at = match.end()
    if text[at:end].strip():
        yield at, end


def _cut_sentence(
    text: str, start: int, end: int, tokenizer: Tokenizer, most: int
) -> Iterator[tuple[int, int, int]]:
    """Yields (start, end, tokens) of the parts of a long sentence."""
    while start < end:
        stop = min(end, start + LETTERS * most)
        with refusing_panics(tokenizer.name):
            encoding = tokenizer.backend.encode(text[start:stop], add_special_tokens=False)
        tokens = len(encoding.ids)
        if tokens > most:
            stop = start + max(encoding.offsets[most - 1][1], 1)
            space = max(text.rfind(mark, start + 1, stop) for mark in " \n\t")
            stop = space + 1 if space > start + (stop - start) // 2 else stop
            tokens = count_tokens(tokenizer, [text[start:stop]])[0]
            while tokens > most and stop > start + 1:  # cut within a word, it may have other tokens
                stop -= max((stop - start) // 8, 1)
                tokens = count_tokens(tokenizer, [text[start:stop]])[0]
        yield start, stop, tokens
        start = stop


def _spans(pieces: Sequence[_Piece], most: int, overlap: int) -> Iterator[tuple[_Piece, _Piece]]:
    """Yields the first and the last piece of each chunk."""
    held: list[_Piece] = []
    for piece in pieces:
        together = sum(one.tokens for one in held) + piece.tokens
        if held and (held[0].section != piece.section or together > most):
            yield held[0], held[-1]
            same = held[0].section == piece.section
            held = _tail(held, min(overlap, most - piece.tokens)) if same else []
        held.append(piece)
    if held:
        yield held[0], held[-1]


def _tail(pieces: list[_Piece], most: int) -> list[_Piece]:
    """The last pieces that together have no more than `most` tokens, but never all of them."""
    kept, total = 0, 0
    for piece in reversed(pieces[1:]):
        total += piece.tokens
        if total > most:
            break
        kept += 1
    return pieces[len(pieces) - kept :]
