"""What a comparison has finished, a line each of RUN/ledger.jsonl: the same command goes on from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft.errors import UserError

Piece = dict[str, Any]


class Ledger:
    """The pieces of work that are done, by their names.

    Args:
        file: where they stand; made with the first.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.pieces: dict[str, Piece] = {}
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut short was not finished
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                piece = json.loads(line)
                self.pieces[piece["piece"]] = piece
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}:{number}: no line of a comparison's ledger") from None
        if whole != text:
            file.write_text(whole, encoding="utf-8")

    @property
    def seconds(self) -> float:
        """What all of them took."""
        return float(sum(piece["seconds"] for piece in self.pieces.values()))

    def take(self, name: str, make: Callable[[], Piece]) -> Piece:
        """The piece of that name, from the file, or made now and added to it."""
        if name not in self.pieces:
            began = time.perf_counter()
            made = make()
            seconds = round(time.perf_counter() - began, 3)
            self.pieces[name] = {"piece": name, "seconds": seconds, **made}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.pieces[name], ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        return self.pieces[name]
