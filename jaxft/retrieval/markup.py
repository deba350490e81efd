"""The words of an HTML page, each character of which knows where it stands in the page."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import numpy as np
from jaxtyping import Int64

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt", "figcaption"),
    *("figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table"),
    *("tbody", "tfoot", "thead", "tr", "ul", "title", *HEADINGS),
}  # fmt: skip
SILENT = {"script", "style", "noscript", "template", "svg", "iframe", "object"}
CELLS = {"td", "th"}
Characters = Int64[np.ndarray, " characters"]


def read_html(markup: str) -> tuple[str, Characters, Characters]:
    """The text of a page, and the (start, end) of each of its characters in the markup.

    Scripts and styles are left out, white space is one space, blocks stand on lines of their own, and a heading of
    level n is written as in Markdown, with n marks before it. What is added stands where it was added, with no width.
    """
    reader = _Reader(markup)
    reader.feed(markup)
    reader.close()
    return reader.result()


class _Reader(HTMLParser):
    """Collects the characters of a page with their offsets."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=False)
        self.markup = markup
        self.lines = [0, *(i + 1 for i, letter in enumerate(markup) if letter == "\n")]
        self.text: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.silent = 0
        self.kept = 0  # of white space: in <pre>

    @property
    def here(self) -> int:
        line, column = self.getpos()
        return self.lines[line - 1] + column

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in SILENT
        self.kept += tag == "pre"
        if tag in BLOCKS:
            self._break(2 if tag in ("p", "pre", "title", *HEADINGS) else 1)
        if tag in HEADINGS and not self.silent:
            self._add("#" * int(tag[1]) + " ")
        if tag == "br":
            self._break(1)
        if tag in CELLS:
            self._space()
        if tag == "li":
            self._add("- ")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(self.silent - (tag in SILENT), 0)
        self.kept = max(self.kept - (tag == "pre"), 0)
        if tag in BLOCKS:
            self._break(2 if tag in ("p", "pre", "title", *HEADINGS) else 1)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if tag in BLOCKS or tag == "br":
            self._break(1)

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        for offset, letter in enumerate(data, start=self.here):
            self._letter(letter, offset, offset + 1)

    def handle_entityref(self, name: str) -> None:
        self._reference(f"&{name}")

    def handle_charref(self, name: str) -> None:
        self._reference(f"&#{name}")

    def _reference(self, written: str) -> None:
        if self.silent:
            return
        start = self.here
        end = start + len(written)
        end += self.markup.startswith(";", end)
        for letter in html.unescape(written + ";"):
            self._letter(letter, start, end)

    def _letter(self, letter: str, start: int, end: int) -> None:
        if letter.isspace() and not self.kept:
            self._space(start, end)
            return
        if 0xD800 <= ord(letter) < 0xE000 or letter == "\0":
            letter = "\ufffd"
        self.text.append(letter)
        self.starts.append(start)
        self.ends.append(end)

    def _space(self, start: int | None = None, end: int | None = None) -> None:
        if self.text and not self.text[-1].isspace():
            self._add(" ", start, end)

    def _add(self, text: str, start: int | None = None, end: int | None = None) -> None:
        if self.silent:
            return
        start = self.here if start is None else start
        for letter in text:
            self.text.append(letter)
            self.starts.append(start)
            self.ends.append(start if end is None else end)

    def _break(self, count: int) -> None:
        """Ends the line, and leaves a blank one where `count` is 2."""
        while self.text and self.text[-1] == " ":
            for column in (self.text, self.starts, self.ends):
                column.pop()
        there = 0
        while there < min(count, len(self.text)) and self.text[-1 - there] == "\n":
            there += 1
        if self.text:
            self._add("\n" * (count - there))

    def result(self) -> tuple[str, Characters, Characters]:
        return "".join(self.text), np.array(self.starts, np.int64), np.array(self.ends, np.int64)
