"""What a folder held when jaxft wrote it: the sha256 of each file, in the folder's `manifest.json`.

Neither Orbax nor safetensors notices every flipped bit (Orbax 0.12 restored 6 of 72 damaged checkpoints without a
word). The manifest is the last file that is written, and it is checked before anything is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import stat
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from jaxft.errors import UserError

NAME = "manifest.json"
LARGEST = 1 << 26  # bytes of a manifest: room for half a million files
CARD = "README.md"  # people write on: it says nothing that is computed with
BASE = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


class Damaged(UserError):
    """A folder is not what its manifest says that was written."""


def write_manifest(folder: Path, **about: Any) -> None:
    """Writes the manifest of a folder that is whole: {"files": {name: sha256}}, and what `about` adds."""
    inside = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: p for name, p in inside.items() if p.is_file() and name not in (NAME, CARD)}
    _write(folder, {"files": digests(files.values(), files.keys()), **about})


def put(folder: Path, name: str, text: str) -> None:
    """Writes a file into a folder that has a manifest, or over the one there, and has the manifest know it."""
    manifest = read_manifest(folder)
    (folder / name).write_text(text, encoding="utf-8")
    manifest["files"] |= digests([folder / name], [name])
    _write(folder, manifest)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    part = folder / f".{NAME}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    part.rename(folder / NAME)


def check_manifest(folder: Path, *, required: bool = False) -> dict[str, Any]:
    """The folder's manifest, once each file is found to be as it was written.

    Args:
        folder: a checkpoint, an adapter or a model.
        required: whether a folder without a manifest is damaged too. Folders of other makers have none.

    Returns:
        The manifest, {} where there is none.

    Raises:
        Damaged: a file is missing, cut off or altered, or the manifest itself is; all of them are named.
    """
    if not (folder / NAME).exists():
        if required:
            raise Damaged(f"{folder}: damaged: {NAME} is missing")
        return {}
    written = read_manifest(folder)
    files: dict[str, str] = written["files"]
    there = {name: folder / name for name in files if (folder / name).is_file()}
    found = digests(there.values(), there.keys())
    wrong = [f"{name} is missing" for name in files if name not in there]
    wrong += [
        f"{name} ({there[name].stat().st_size:,} bytes) is not what was written: its sha256 differs"
        for name in there
        if found[name] != files[name]
    ]
    if wrong:
        raise Damaged(
            f"{folder}: damaged: {'; '.join(wrong)} (if that was on purpose, delete its {NAME})"
        )
    return written


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that has one. Raises Damaged for what is none, or leads out of the folder."""
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("too large")
        written = json.loads(path.read_text(encoding="utf-8"))
        names = list(written["files"].items())
        if not names or not all(isinstance(digest, str) for _, digest in names):
            raise ValueError("no digests")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise Damaged(f"{folder}: damaged: {NAME} is no manifest") from error
    for name, _ in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name or not pure.parts:
            raise Damaged(f"{folder}: {NAME}: {name!r} leads out of the folder")
    return written


def fingerprint(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """{name: sha256} of the folder's files that the patterns name: whether two folders are the same base.

    Not computed again while the files' sizes and times of change stay.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    status = [path.stat() for path in files]
    return dict(
        _fingerprint(
            tuple(path.absolute() for path in files),
            tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in status),
        )
    )


def tell_another_base(adapter: Path, base: Path) -> None:
    """Says on stderr where an adapter's manifest names other files of a base than those it is put on.

    The shapes may fit, and the base may be the same in another dtype: so this is said, not refused.
    """
    if not (adapter / NAME).exists():
        return
    trained_on = read_manifest(adapter).get("base")
    files = changed(trained_on, fingerprint(base, BASE)) if isinstance(trained_on, dict) else []
    if trained_on and files:
        print(
            f"jaxft: {adapter} was trained on another base than {base}: {', '.join(files)} differ",
            file=sys.stderr,
        )


@functools.lru_cache(maxsize=64)
def _fingerprint(
    files: tuple[Path, ...], status: tuple[tuple[int, ...], ...]
) -> tuple[tuple[str, str], ...]:
    del status  # a part of the key alone
    return tuple(digests(files, [path.name for path in files]).items())


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names whose digests differ, or that only one of the two has.

    >>> changed({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    ['b', 'c']
    """
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def digests(files: Iterable[Path], names: Iterable[str]) -> dict[str, str]:
    """{name: sha256 of its file}, several files at once."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_sha256, files), strict=True))


def _sha256(file: Path) -> str:
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would never end
        raise Damaged(f"{file}: not a regular file")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
