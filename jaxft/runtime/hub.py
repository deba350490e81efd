"""Models, adapters and data sets of the Hugging Face hub, by their names: OWNER/NAME, perhaps @REVISION.

`huggingface_hub` fetches them into its own cache and honours HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. Of a
repository come config, tokenizer, templates and safetensors, and of these the whole file or the shards of the index:
never a pickle, and never code. The folder's name in the cache is the commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest, shown

NAME = re.compile(
    r"(https://(?:huggingface\.co|hf\.co)/|hf://)?(\w[\w.-]*/\w[\w.-]*?)(?:@([\w./-]+))?/?"
)
DATASET = re.compile(
    r"hf://datasets/(\w[\w.-]*/\w[\w.-]*?)(?:@([\w.-]+))?(?:/([^:]*))?(?::([\w.-]+))?"
)
ALONE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.*", "additional_chat_templates/*.jinja",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.int8.safetensors", "manifest.json", "README.md",
)  # fmt: skip
CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.so")
INDEX = "model.safetensors.index.json"
CARD = "README.md"
CARD_TEXT = """---
library_name: transformers
tags: [jaxft]
---

# {name}

A model in Hugging Face's format, fine-tuned by jaxft.
"""
COMMIT = re.compile(r"[0-9a-f]{40}")
FULL = 28  # ENOSPC


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    Attributes:
        name: OWNER/NAME.
        revision: a branch, a tag or a commit; "" for the newest.
        kind: "model" or "dataset".
    """

    name: str
    revision: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def meant(name: str | Path) -> Repository | None:
    """The repository that a model's or an adapter's name means; None where it is a path of this machine.

    It is a path where something of that name stands, or the folder around it does: a mistyped path is nothing that
    the hub is asked for. `hf://OWNER/NAME` means the hub whatever stands here.
    """
    text = f"openai-community/{name}" if str(name) in ALONE else str(name)
    found = NAME.fullmatch(text)
    if found is None:
        return None
    repository = Repository(found[2], found[3] or "")
    if found[1]:
        return repository
    if Path(name).exists():
        if repository.revision or _cached(repository) is not None:
            _tell(f"{name}: the folder of that name is taken, not the hub's (which is hf://{name})")
        return None
    return None if Path(text).parent.is_dir() else repository


@functools.lru_cache(maxsize=256)
def _tell(line: str) -> None:
    """Says a line once."""
    print(f"jaxft: {line}", file=sys.stderr)


def folder_of(repository: Repository, *, weights: bool = True) -> Path:
    """The folder in the cache where a model or an adapter stands, fetched as far as it is not there.

    Args:
        repository: which.
        weights: whether the model's weights are needed. Without them a few small files come.

    Raises:
        UserError: no such repository or revision, one that is gated, no connection, or no room: with what to do.
    """
    return _folder_of(repository, weights)


@functools.cache
def _folder_of(repository: Repository, weights: bool) -> Path:
    folder = _fetch(repository, SETTINGS)
    if not weights or (folder / "adapter_config.json").exists():
        return folder
    pinned = dataclasses.replace(repository, revision=folder.name)
    if not _is_whole(folder):
        _tell(f"fetching the weights of {repository} from the hub")
    _fetch(pinned, ["model.safetensors"])
    if not (folder / "model.safetensors").exists() and (folder / INDEX).exists():
        _fetch(pinned, _shards(folder / INDEX))
    return folder


def _is_whole(folder: Path) -> bool:
    names = _shards(folder / INDEX) if (folder / INDEX).exists() else ["model.safetensors"]
    return all((folder / name).exists() for name in names)


def _shards(index: Path) -> list[str]:
    """The files that an index of safetensors names, where they are names; another reader judges the rest."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(
        n for n in names if isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n)
    )


def commit_of(repository: Repository) -> str:
    """The commit that a name means now: 40 letters."""
    return folder_of(repository, weights=False).name


def cached_folder(repository: Repository) -> Path | None:
    """Where it stands in the cache, as much of it as does; None where it does not. Asks nobody."""
    return _cached(repository)


def _cached(repository: Repository) -> Path | None:
    from huggingface_hub import constants

    cache = Path(
        constants.HF_HUB_CACHE, f"{repository.kind}s--{repository.name.replace('/', '--')}"
    )
    try:
        revision = repository.revision or "main"
        if not COMMIT.fullmatch(revision):
            revision = (cache / "refs" / revision).read_text(encoding="utf-8")[:64].strip()
        folder = cache / "snapshots" / revision
        return folder if revision.isalnum() and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def data_path(name: str, endings: Sequence[str]) -> str:
    """The path in the cache of `hf://datasets/OWNER/NAME[@REVISION][/PATH][:SPLIT]`, the split still behind it.

    Only the files in or below PATH that have one of these endings are fetched; of PATH that is a file or a glob, these.

    Raises:
        UserError: as `folder_of`, or a name that is of another form.
    """
    found = DATASET.fullmatch(name)
    if found is None:
        raise UserError(
            f"{name}: a data set of the hub is hf://datasets/OWNER/NAME[@REVISION], perhaps with /PATH or :SPLIT "
            "behind it"
        )
    repository = Repository(found[1], found[2] or "", "dataset")
    inside, split = (found[3] or "").strip("/"), found[4]
    below = [f"{inside}/*{end}" if inside else f"*{end}" for end in endings]
    folder = _fetch(repository, [inside] if inside.endswith(tuple(endings)) else below)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{name}: no data there; read are {', '.join(endings)}")
    return f"{folder / inside}:{split}" if split else str(folder / inside)


def _fetch(repository: Repository, patterns: Sequence[str]) -> Path:
    """The snapshot's folder with those files in it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()  # a line for each new file of a log would be many
    with _told(repository):
        return Path(
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(CODE),
            )
        )


def push(folder: Path, name: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Uploads an adapter or a model with its card, and makes the repository where there is none.

    Args:
        folder: RUN/adapter, RUN/model, or another such folder.
        name: OWNER/NAME.
        public: whether a new repository is for everybody to see.
        overwrite: whether files of the repository that differ are replaced.

    Returns:
        Where to look at it.

    Raises:
        UserError: the folder is neither, the name is none, files there differ, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

    found = NAME.fullmatch(name)
    if found is None or found[3]:
        raise UserError(f"--repository {name}: is no OWNER/NAME of the hub")
    repository = Repository(found[2])
    files = _to_upload(folder)
    api = HfApi()
    with _told(repository, writing=True):
        made = api.create_repo(repository.name, private=not public, exist_ok=True)
        there = {
            one.path: one.lfs.sha256 if one.lfs else one.blob_id
            for one in api.list_repo_tree(repository.name, recursive=True)
            if isinstance(one, RepoFile)
        }
        differ = [n for n, file in files.items() if n in there and there[n] not in _hashes(file)]
        if differ and not overwrite:
            names = f"{', '.join(differ[:6])}{', ...' * (len(differ) > 6)}"
            raise UserError(
                f"{repository}: holds other files of these names: {names}; "
                "--overwrite replaces them (the hub keeps the old ones in its history), or name another repository"
            )
        if not differ and files.keys() <= there.keys():
            return f"{made} (which holds these very files)"
        whole: dict[str, Any] = dict(files)
        if CARD not in files and CARD not in there:
            whole[CARD] = CARD_TEXT.format(name=repository.name.partition("/")[2]).encode()
        added = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=f) for n, f in whole.items()]
        api.create_commit(
            repository.name, added, commit_message=f"{folder.resolve().name}, by jaxft"
        )
    return str(made)


def _to_upload(folder: Path) -> dict[str, Path]:
    """{name: file} of what goes to the hub: what `SETTINGS` and the index name. UserError for no adapter or model."""
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder; give RUN/adapter or RUN/model")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        inner = [folder / n for n in ("adapter", "model") if (folder / n).is_dir()]
        hint = f"; give {inner[0]}" if inner else ""
        raise UserError(f"--folder {folder}: neither an adapter nor a model{hint}")
    weights = [
        "model.safetensors",
        *(_shards(folder / INDEX) if (folder / INDEX).is_file() else []),
    ]
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    chosen = {
        name: path
        for name, path in files.items()
        if any(fnmatch.fnmatchcase(name, p) for p in (*SETTINGS, *weights))
        and not any(fnmatch.fnmatchcase(name, p) for p in CODE)
    }
    if not any(name.endswith(".safetensors") for name in chosen):
        raise UserError(f"--folder {folder}: holds no safetensors")
    if left := sorted(files.keys() - chosen.keys()):
        _tell(f"not uploaded: {', '.join(left[:6])}{', ...' * (len(left) > 6)}")
    return chosen


def _hashes(file: Path) -> tuple[str, str]:
    """What the hub may call a file by: git's hash of it, or the sha256 of what it stores apart."""
    import hashlib

    git, plain = hashlib.sha1(b"blob %d\0" % file.stat().st_size), hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            git.update(part)
            plain.update(part)
    return git.hexdigest(), plain.hexdigest()


@contextlib.contextmanager
def _told(repository: Repository, *, writing: bool = False) -> Iterator[None]:
    """Within it, what the client raises is a UserError that says what to do."""
    from huggingface_hub import constants

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _says(error, "OfflineModeIsEnabled") or constants.HF_HUB_OFFLINE:
            cached = "" if writing else f", and it is not whole in {constants.HF_HUB_CACHE}"
            raise UserError(
                f"{repository}: HF_HUB_OFFLINE is set{cached}: unset it, or give a folder"
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", 0)
        for kind, line in REASONS.items():
            if _says(error, kind) or (status in (401, 403) and kind == "RepositoryNotFoundError"):
                raise UserError(f"{repository}: {line(repository, writing)}") from error
        number = getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)
        if number == FULL:
            cache = Path(constants.HF_HUB_CACHE)
            there = next(p for p in (cache, *cache.parents) if p.exists())
            raise UserError(
                f"{repository}: no room in {cache} ({shutil.disk_usage(there).free:,} bytes are free): set HF_HOME to "
                "a folder on another disk"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{repository}: {constants.ENDPOINT} cannot be asked ({type(error).__name__}: {reason}): try again, or "
            f"fetch it elsewhere (hf download {repository.name} --local-dir DIR) and give DIR"
        ) from error


def _says(error: BaseException | None, kind: str) -> bool:
    """Whether an error, or one that it was raised from, is of the class of that name."""
    while error is not None:
        if any(one.__name__ == kind for one in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _gated(repository: Repository, writing: bool) -> str:
    from huggingface_hub import constants

    return (
        f"is gated: accept its terms at {constants.ENDPOINT}/{repository.name}, then say who you are "
        "(hf auth login, or HF_TOKEN)"
    )


def _missing(repository: Repository, writing: bool) -> str:
    from huggingface_hub import constants, get_token

    if writing:
        who = "the token may not" if get_token() else "say who you are (hf auth login, or HF_TOKEN)"
        return f"{constants.ENDPOINT} does not let you write there: {who}"
    who = "the token may not see it" if get_token() else "it is private: hf auth login, or HF_TOKEN"
    kind = "data set" if repository.kind == "dataset" else "model"
    here = (
        "" if repository.kind == "dataset" else f", and there is no folder {repository.name} here"
    )
    return f"no such {kind} at {constants.ENDPOINT}, or {who}{here}"


def _no_revision(repository: Repository, writing: bool) -> str:
    from huggingface_hub import HfApi

    names: list[str] = []
    with contextlib.suppress(Exception):  # the names are a help, and no more
        refs = HfApi().list_repo_refs(repository.name, repo_type=repository.kind)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    known = nearest(repository.revision, names) or (
        f"; there are: {', '.join(names[:8])}" if names else ""
    )
    return f"no revision {shown(repository.revision)}{known}"


def _limited(repository: Repository, writing: bool) -> str:
    return "is disabled on the hub"


REASONS: dict[str, Callable[[Repository, bool], str]] = {
    "GatedRepoError": _gated,
    "RevisionNotFoundError": _no_revision,
    "RepositoryNotFoundError": _missing,
    "DisabledRepoError": _limited,
}
