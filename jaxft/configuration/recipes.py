"""Finds a recipe (a Python file with `get_config`) and runs it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.errors import UserError, nearest

PACKAGE = Path(__file__).parent.parent


def split_source(source: str) -> tuple[str, str | None]:
    """Splits `PATH:ARGUMENT`; the path ends in .py or .json.

    >>> split_source("configs/sft.py:lora"), split_source("run/config.json")
    (('configs/sft.py', 'lora'), ('run/config.json', None))

    Raises:
        UserError: there is no such file; the nearest is named.
    """
    found = re.fullmatch(r"(.*?\.(?:py|json))(?::(.*))?", source)
    if not found:
        raise _no_file(source)
    return found[1], found[2]


def find(path: str) -> Path:
    """The file at `path`, from the working directory, else among the recipes of the package.

    Raises:
        UserError: there is no such file; the nearest is named.
    """
    name = path.removeprefix("configs/")
    for candidate in (Path(path), *(folder / name for folder in _folders())):
        if candidate.is_file():
            return candidate
    raise _no_file(path)


def read_text(path: Path) -> str:
    """The file's text; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def run(path: Path, argument: str | None, method: str | None = None) -> ConfigDict:
    """What the recipe's `get_config` returns for the argument.

    `method` stands for the argument if that is what the recipe calls it. The file runs in a
    namespace of its own and leaves nothing behind, neither a module nor compiled code.

    Raises:
        UserError: the file has no `get_config`, or it fails; with its line.
    """
    text, namespace = read_text(path), {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(text, str(path), "exec"), namespace)
    except UserError:
        raise
    except Exception as error:
        raise _failed(path, error) from None
    get_config = namespace.get("get_config")
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config{nearest('get_config', namespace)}")
    return _call(path, get_config, argument, method)


def recipe(path: str, argument: str) -> ConfigDict:
    """What another recipe returns for the argument: what one that only differs from it begins with."""
    return run(find(path), argument)


def _call(
    path: Path, get_config: Callable[..., Any], argument: str | None, method: str | None
) -> ConfigDict:
    names = list(inspect.signature(get_config).parameters)
    if argument is not None and not names:
        raise UserError(f"{path}: get_config takes no argument, not {argument!r}")
    if method is not None and names[:1] == ["method"]:
        argument = method
    try:
        config = get_config(*([] if argument is None else [argument]))
    except UserError:
        raise
    except Exception as error:
        raise _failed(path, error) from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returns a {type(config).__name__}, not a ConfigDict")
    return config


def _folders() -> list[Path]:
    """Where the recipes stand: in the package as installed, next to it in a checkout."""
    return [PACKAGE / "configs", PACKAGE.parent / "configs"]


def _no_file(path: str) -> UserError:
    names = {f"configs/{file.name}" for folder in _folders() for file in folder.glob("*.py")}
    parent = Path(path).parent
    names |= {str(file) for kind in ("*.py", "*.json") for file in parent.glob(kind)}
    known = nearest(path, sorted(names)) or f" (there are: {', '.join(sorted(names)[:8])})"
    return UserError(f"--config {path}: no such file; it takes a .py or .json file{known}")


def _failed(path: Path, error: Exception) -> UserError:
    """Where in the recipe the error arose, and what it says."""
    line = getattr(error, "lineno", None)
    if line is None:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), 0)
    return UserError(f"{path}:{line}: {type(error).__name__}: {error}")
