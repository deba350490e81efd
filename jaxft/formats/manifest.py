"""What a folder held when jaxft wrote it: the digest of each file, in the folder's `manifest.json`.

Neither Orbax nor safetensors notices every flipped bit (Orbax 0.12 restored 6 of 72 damaged checkpoints without a
word). The manifest is the last file that is written, and it is checked before anything is read.

The digest is the sha256. Of a file that was written into an object store it is the size: the store keeps checksums of
its own, an object is whole or not there, and reading a checkpoint of many hosts back would take longer than writing it.
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
from jaxft.runtime.storage import files_under, is_remote, size_of, write_text

NAME = "manifest.json"
LARGEST = 1 << 26  # bytes of a manifest: room for half a million files
TRAINED_ON = "trained_on"  # "chats" or "texts": how what was trained is asked
CARD = "README.md"  # people write on: it says nothing that is computed with
BASE = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


class Damaged(UserError):
    """A folder is not what its manifest says that was written."""


def write_manifest(folder: Path, **about: Any) -> None:
    """Writes the manifest of a folder that is whole: {"files": {name: digest}}, and what `about` adds."""
    inside = files_under(folder)
    files = {name: path for name, path in inside.items() if name not in (NAME, CARD)}
    _write(folder, {"files": digests(files.values(), files.keys()), **about})


def put(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Writes files into a folder, or takes those away that are None, and has its manifest know it."""
    manifest = read_manifest(folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
            del manifest["files"][name]
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    names = [name for name, content in files.items() if content is not None]
    manifest["files"] |= digests([folder / name for name in names], names)
    _write(folder, manifest)


def note(folder: Path, **about: Any) -> None:
    """Adds to what the manifest of a folder says beside its files; nothing where the folder has none."""
    if (folder / NAME).exists():
        _write(folder, read_manifest(folder) | about)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_text(folder / NAME, json.dumps(manifest, indent=2) + "\n")


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
    with ThreadPoolExecutor() as pool:
        wrong = list(filter(None, pool.map(lambda name: _wrong(folder, name, files[name]), files)))
    if wrong:
        hint = "" if required else f" (if that was on purpose, delete its {NAME})"
        raise Damaged(f"{folder}: damaged: {'; '.join(wrong)}{hint}")
    return written


def _wrong(folder: Path, name: str, digest: str) -> str:
    """What is wrong with a file of which the manifest says this; "" if nothing is."""
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    size, by_size = size_of(file), digest.startswith(_size(""))
    if digest == (_size(size) if by_size else _sha256(file)):
        return ""
    kind = "size" if by_size else "sha256"
    return f"{name} ({size:,} bytes) is not what was written: its {kind} differs"


def _size(size: Any) -> str:
    return f"bytes:{size}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that has one. Raises Damaged for what is none, or leads out of the folder."""
    path = folder / NAME
    try:
        if size_of(path) > LARGEST:
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


def trained_over(adapter: Path) -> dict[str, str]:
    """{file: digest} of the base over which an adapter was trained, as its manifest says; {} where nothing says it."""
    found = read_manifest(adapter).get("base") if (adapter / NAME).exists() else None
    return found if isinstance(found, dict) else {}


def tell_another_base(adapter: Path, base: Path) -> None:
    """Says on stderr where an adapter's manifest names other files of a base than those it is put on.

    The shapes may fit, and the base may be the same in another dtype: so this is said, not refused.
    """
    trained_on = trained_over(adapter)
    if not trained_on or not any(base.glob(BASE[1])):  # a base of shapes alone
        return
    if files := changed(trained_on, fingerprint(base, BASE)):
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
    """{name: digest of its file}, several files at once."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_digest, files), strict=True))


def _digest(file: Path) -> str:
    return _size(size_of(file)) if is_remote(file) else _sha256(file)


def _sha256(file: Path) -> str:
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would never end
        raise Damaged(f"{file}: not a regular file")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
