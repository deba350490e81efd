"""TensorFlow Datasets without TensorFlow: builders of the catalogue or one's own, on array_record files."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxft.data.files import choose_split
from jaxft.errors import UserError, nearest

Record = tuple[str, dict[str, Any]]
PREFIX = "tfds:"
ROWS = 512  # read at once
OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def read_tfds(name: str, held_out: bool = False) -> tuple[Callable[[], Iterator[Record]], str]:
    """What yields the examples of `tfds:NAME[:SPLIT]` with their locations ("tfds:NAME:SPLIT:row"); the split.

    NAME is one of the catalogue ("gsm8k", "glue/cola:1.0.0"), a class ("my_module.MyBuilder", also of the
    working directory), or a folder that a builder wrote. SPLIT may be a slice ("train[:10%]"). A data
    set that is not prepared yet is, as array_record files, in TFDS_DATA_DIR. Texts are decoded.

    Raises:
      UserError: no such data set, class or split, or it is stored as other files than array_record.
    """
    found = re.fullmatch(r"(.+?)(?::([A-Za-z_][\w+]*(?:\[[^\]]*\])?))?", name.removeprefix(PREFIX))
    if not found:
        raise UserError(f"{name}: takes {PREFIX}NAME or {PREFIX}NAME:SPLIT")
    wanted, split = found[1], found[2] or ""
    with _quiet():
        try:
            builder = _prepared(name, wanted)
            splits = list(builder.info.splits)
            base = re.split(r"[\[+]", split)[0]
            chosen = choose_split(PREFIX + wanted, base, splits, held_out)
            source = builder.as_data_source(split=split or chosen)
        except UserError:
            raise
        except Exception as error:  # a builder is anyone's code
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name}: cannot be read: {type(error).__name__}: {reason}") from error
    origin_prefix = f"{PREFIX}{wanted}:{split or chosen}"
    return functools.partial(_records, origin_prefix, source), split or chosen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What builders print goes to stderr, without bars."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _prepared(name: str, wanted: str) -> Any:
    """The builder, with its files."""
    import tensorflow_datasets as tfds

    folder = _built(wanted)
    if folder:
        return tfds.builder_from_directory(folder)
    if os.path.isdir(wanted):
        raise UserError(f"{name}: no data set that a builder wrote (no features.json in it)")
    if OWN.fullmatch(wanted):
        builder = _own_class(name, wanted)(file_format="array_record")
    else:
        try:
            builder = tfds.builder(wanted, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError:
            close = nearest(wanted, tfds.list_builders(with_community_datasets=False))
            raise UserError(
                f"{name}: no such data set{close}; of one's own it is "
                f"{PREFIX}module.Builder or {PREFIX}FOLDER"
            ) from None
    if not builder.info.splits:
        builder.download_and_prepare()
    return builder


def _built(folder: str) -> str:
    """The folder itself or its newest version below, if a builder wrote it; else ""."""
    if os.path.isfile(os.path.join(folder, "features.json")):
        return folder
    inside = os.listdir(folder) if os.path.isdir(folder) else []
    versions = [v for v in inside if os.path.isfile(os.path.join(folder, v, "features.json"))]
    newest = max(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], default="")
    return newest and os.path.join(folder, newest)


def _own_class(name: str, wanted: str) -> Any:
    """The builder's class, imported as from a script in the working directory."""
    module_name, _, class_name = wanted.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{name}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(module, class_name):
        raise UserError(
            f"{name}: {module_name} has no {class_name}{nearest(class_name, dir(module))}"
        )
    return getattr(module, class_name)


def _records(origin_prefix: str, source: Any) -> Iterator[Record]:
    for start in range(0, len(source), ROWS):
        numbers = range(start, min(start + ROWS, len(source)))
        for number, values in zip(numbers, source.__getitems__(list(numbers)), strict=True):
            origin = f"{origin_prefix}:{number + 1}"
            try:
                yield origin, {key: _plain(value) for key, value in values.items()}
            except UnicodeDecodeError as error:
                raise UserError(f"{origin}: not UTF-8") from error


def _plain(value: Any) -> Any:
    """The value with texts for bytes, and Python's numbers and lists for NumPy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
