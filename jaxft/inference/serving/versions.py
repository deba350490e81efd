"""The versions of a base that a server has: which adapters, by which names, and how one is put in or taken out."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.assets import model_folder
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, named, nearest, shown
from jaxft.formats import load, put_adapter, stack_adapters
from jaxft.formats.manifest import tell_another_base
from jaxft.formats.peft_writing import read_quantization
from jaxft.formats.trained_base import another_base, load_trained_base
from jaxft.inference.opening import open_words
from jaxft.inference.serving.engine import Engine
from jaxft.inference.serving.models import Served, served
from jaxft.inference.serving.protocol import Refused
from jaxft.models import Transformer
from jaxft.quantizing import quantization_of
from jaxft.runtime.storage import fetched
from jaxft.tree import PyTree
from jaxft.weights import SLOTS, slots_of

LONGEST_NAME = 200


@dataclasses.dataclass(frozen=True)
class Room:
    """For which adapters there is room that come later.

    Attributes:
        folders: below which they must be.
        count: how many at once.
        rank: the largest; those that are there at the start may have larger ones.
    """

    folders: tuple[str, ...] = ()
    count: int = 0
    rank: int = 0


class Spoken(NamedTuple):
    """How models are spoken to, as of `open_words`."""

    tokenizer: str = ""
    chat_template: str = ""
    date: str = ""


NO_ROOM, NO_FLAGS = Room(), Spoken()


def adapters_of(given: Sequence[str], base: str) -> dict[str, str]:
    """{name: folder} of NAME=FOLDER each. Raises UserError: another form, or a name that two have."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter takes NAME=FOLDER, not {shown(text)}")
        _check_name(name, "--adapter")
        if name in found or name == base:
            other = f"of {found[name]}" if name in found else "the base's"
            raise UserError(
                f"--adapter {named(text)}: the name {name!r} is {other} already: give it another"
            )
        found[name] = folder
    return found


def _check_name(name: str, where: str) -> None:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise UserError(
            f"{where}: {shown(name)} is no name: up to {LONGEST_NAME} letters that print"
        )


def open_base(
    model: str, adapters: Mapping[str, str], dtype: str
) -> tuple[Transformer, PyTree, dict[str, Path]]:
    """(model, parameters, {name: adapter's folder}): the base on which all the adapters were trained.

    Raises:
        UserError: adapters of which one was trained over a quantized base, and another was not, or over another.
    """
    folder = model_folder(model)
    folders = {name: fetched(one) for name, one in adapters.items()}
    trained: dict[str, Any] = {name: read_quantization(one) for name, one in folders.items()}
    first = next((name for name, known in trained.items() if known), None)
    if first is None:
        network, params = load(folder, dtype=dtype)
    else:
        network, params, _ = load_trained_base(folder, folders[first], dtype)
    found = quantization_of(params)
    for name, one in folders.items():
        tell_another_base(one, folder)
        if first is not None and trained[name] != found:
            error = another_base(one, folder, trained[name], found)
            raise UserError(f"--adapter {name}: {error}; {first} is served over it")
    return network, params, folders


class Versions:
    """The models of a server; those over the base come and go. `put` and `drop` may take long: not in an event loop.

    Args:
        base: the base.
        folder: where it was read.
        spoken: how its versions are spoken to.
        room: for which adapters there is room later.
        tree: a bank, of `bank_of`; None: no adapter is served, ever.

    Attributes:
        models: {name: model}, the base first.
    """

    def __init__(
        self,
        base: Served,
        folder: str = "",
        spoken: Spoken = NO_FLAGS,
        room: Room = NO_ROOM,
        tree: PyTree | None = None,
    ) -> None:
        self.base, self.folder, self.spoken, self.room, self.tree = base, folder, spoken, room, tree
        self.models = {base.name: base}
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)

    def add(self, name: str, folder: Path | str, index: int) -> Served:
        """Names what is at an index of the bank."""
        words = open_words(self.folder, str(folder), **self.spoken._asdict()).tokenizer
        tokenizer = _sharing(words, self.base.tokenizer)
        others = {"parent": self.base.name, "adapter": index, "version": next(self.numbers)}
        self.models[name] = served(name, str(folder), tokenizer, **others)
        return self.models[name]

    def put(self, engine: Engine, name: Any, path: Any) -> Served:
        """Reads an adapter into the bank. Raises Refused: a folder or a name that may not be, or no room."""
        if not isinstance(name, str) or not name:
            raise Refused(400, "lora_name must be a name", "lora_name")
        with self.lock:
            if name in self.models:
                raise Refused(400, f"{shown(name)} is served already", "lora_name", "taken")
            folder = self._allowed(path)
            try:
                _check_name(name, "lora_name")
                index = self._free(engine)
                tree = put_adapter(self.tree or {}, name, folder, index=index)
                model = self.add(name, folder, index)
            except UserError as error:
                raise Refused(400, str(error), "lora_path") from error
            self.tree = tree
            engine.exchange(without_names(tree))
        return model

    def drop(self, name: Any) -> None:
        """Takes an adapter out; what is on its way still ends. Raises Refused: there is none of that name."""
        with self.lock:
            model = self.models.get(name) if isinstance(name, str) else None
            if model is None or model.parent is None or self.tree is None:
                others = [one for one, model in self.models.items() if model.parent is not None]
                close = nearest(str(name), others)
                raise Refused(
                    404, f"there is no adapter {shown(name)}{close}", "lora_name", "model_not_found"
                )
            del self.models[name]
            record = slots_of(self.tree)
            names = tuple(None if known == name else known for known in record.names)
            self.tree = {**self.tree, SLOTS: dataclasses.replace(record, names=names)}

    def _allowed(self, path: Any) -> Path:
        """The folder, if it is below one that was named at the start."""
        if not self.room.folders:
            raise Refused(
                403, "no folder is named from which adapters may come: --adapters-from FOLDER"
            )
        if not isinstance(path, str) or not path or "\0" in path or len(path) > 4096:
            raise Refused(400, "lora_path must be a folder", "lora_path")
        for folder in self.room.folders:
            root = Path(folder).resolve()
            found = (root / path).resolve()  # an absolute path stays as it is
            if found.is_relative_to(root) and found.is_dir():
                return found
        told = f"{shown(path)} is no folder below those from which adapters may come"
        raise Refused(403, told, "lora_path", "not_allowed")

    def _free(self, engine: Engine) -> int:
        """An index that no adapter has, and no row still reads."""
        names = slots_of(self.tree or {}).names
        free = [index for index, name in enumerate(names) if name is None]
        index = next((index for index in free if not engine.reads(index)), None)
        if index is None:
            still = "; one that was taken out still answers" if free else ""
            raise Refused(
                409, f"the bank's {len(names)} indices are taken{still}", "lora_name", "full"
            )
        return index


def bank_of(params: PyTree, folders: Mapping[str, Path], room: Room) -> PyTree | None:
    """The base with its adapters and the room for others; None where there is neither."""
    if not folders and not room.count:
        return None
    options: dict[str, Any] = {}
    if room.count:
        options = {"rank": room.rank, "targets": ("all-linear",)}
    return stack_adapters(params, folders, slots=len(folders) + room.count, **options)


def without_names(tree: PyTree) -> PyTree:
    """A bank as programs see it: another name is no other program."""
    return {name: child for name, child in tree.items() if name != SLOTS}


def _sharing(words: Tokenizer, base: Tokenizer) -> Tokenizer:
    """A tokenizer that shares the base's vocabulary in memory where it is the same."""
    if words.backend.to_str() != base.backend.to_str():
        return words
    return dataclasses.replace(words, backend=base.backend)
