"""What stands beside a folder's weights and goes along with them: tokenizer, chat templates, generation settings.

Where an adapter is merged, what stands beside it counts before what stands beside its base. A tokenizer is one thing in
several files, and so are the chat templates: of each the merged folder has the adapter's or the base's, never some
files of both.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxft.data.special_tokens import DECODER, PARTS
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError, shown
from jaxft.runtime.untrusted import read_bytes, stays_inside

SETTINGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", *VOCABULARY,
)  # fmt: skip
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
MAX_BYTES = 200_000_000  # of a companion; the largest tokenizers have about 35 MB
ALL = (*SETTINGS, *TEMPLATES, *TOKENIZER)
Files = dict[str, bytes]


def companions(source: Path, over: Path | None = None) -> Files:
    """{name: content} of what goes along with a folder's weights.

    Args:
        source: the model's folder.
        over: an adapter's, which counts first: its tokenizer, where it has a vocabulary, instead of the model's;
            any template of its own instead of the model's templates; other files by name. Without a template of its
            own it keeps the model's.
    """
    found = _found(source, ALL)
    return found if over is None else _over(found, _found(over, ALL))


def _over(found: Files, own: Files) -> Files:
    """A model's companions and those that count before them."""
    templates = _templates(found)
    if set(own) & set(VOCABULARY):
        found = {name: data for name, data in found.items() if not _is(name, TOKENIZER)}
    if _templates(own):
        found = {name: data for name, data in found.items() if not _is(name, TEMPLATES)}
        if CONFIG in found and CONFIG not in own:
            found |= _without_template(found[CONFIG])
    elif CONFIG in own or CONFIG not in found:
        found |= templates  # which may have stood in the tokenizer_config.json that is left out
    return found | own


def trained_with(
    tokenizer: Path | None,
    template: str | None,
    tool_template: str | None,
    words: Tokenizer | None = None,
) -> Files:
    """What a run lays beside its result: another tokenizer than the base's, and the templates that it trained by.

    Args:
        tokenizer: the folder of another tokenizer; None for the base's.
        template: of the run's chats; None where it trained none.
        tool_template: that for chats with tools, where it is another.
        words: the tokenizer of that folder, where tokens were added to it.
    """
    own = _found(tokenizer, (*TEMPLATES, *TOKENIZER)) if tokenizer else {}
    if words is not None:
        own |= _with_added(own, words)
    by_name = {TEMPLATE: template, TOOL_TEMPLATE: tool_template}
    written = {name: text.encode() for name, text in by_name.items() if text}
    if written:
        own = {name: data for name, data in own.items() if not _is(name, TEMPLATES)}
        own |= _without_template(own[CONFIG]) if CONFIG in own else {}
    return own | written


def _with_added(own: Files, words: Tokenizer) -> Files:
    """tokenizer.json as it stands with the tokens that were added, which tokenizer_config.json then lists too."""
    made = {"tokenizer.json": words.backend.to_str(pretty=True).encode()}
    config = _config(own)
    if DECODER in config:  # it counts before tokenizer.json
        added = words.backend.get_added_tokens_decoder().items()
        listed = {
            str(index): {part: getattr(token, part) for part in PARTS} for index, token in added
        }
        config[DECODER] = listed | config[DECODER]
        made[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return made


def changes(folder: Path, own: Files) -> dict[str, bytes | None]:
    """What becomes of a folder's companions where these count before them: {name: content, or None: it goes}."""
    found = _found(folder, ALL)
    laid = _over(found, own)
    gone = dict.fromkeys(name for name in found if name not in laid)
    return gone | {name: data for name, data in laid.items() if found.get(name) != data}


def merged_tokenizer(
    source: Path, over: Path | None = None, chat_template: str = "", date: str = ""
) -> Tokenizer:
    """The tokenizer of a model's folder, or of that which the model and an adapter make when they are merged.

    Args:
        source: the model's folder.
        over: an adapter's, as of `companions`.
        chat_template: as of `load_tokenizer`, like `date`.
        date: likewise.
    """
    if over is None or not _names(over, ALL):
        return load_tokenizer(source, chat_template, date)
    files = companions(source, over)
    if "tokenizer.json" not in files:  # the adapter's is of a kind that jaxft does not read
        own = _found(over, (*SETTINGS, *TEMPLATES))
        files = _over(_found(source, ALL), own)
    return _tokenizer(files | _found(source, ("config.json",)), over, chat_template, date)


def lay_beside(target: Path, source: Path, over: Path | None = None) -> None:
    """Writes the companions into a folder, and says on stderr which are the adapter's."""
    for folder in filter(None, (source, over)):
        _tell_links(folder)
    files = companions(source, over)
    for name, data in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    own = (
        sorted(set(files) & set(_names(over, (*SETTINGS, *TEMPLATES, *TOKENIZER)))) if over else []
    )
    if own:
        left = sorted(set(_names(source, (*TEMPLATES, *TOKENIZER))) - set(files))
        instead = f"; of the base's are left out: {', '.join(left)}" if left else ""
        print(f"jaxft: from beside the adapter: {', '.join(own)}{instead}", file=sys.stderr)


def check_tokens(model: Path, adapter: Path, rows: int) -> None:
    """Raises UserError where the adapter's tokenizer has tokens for which the model has no row of its embedding."""
    files = companions(model, adapter)
    if not _names(adapter, TOKENIZER) or "tokenizer.json" not in files:
        return
    size, last = _size(files, adapter)
    if size > rows and (
        "tokenizer.json" not in (base := companions(model)) or _size(base, model)[0] < size
    ):
        raise UserError(
            f"{adapter}: its tokenizer has {size} tokens (the last is {shown(last)}), and the base's embedding "
            f"{rows} rows: merge it with the base that was resized for them"
        )


def _size(files: Files, where: Path) -> tuple[int, str | None]:
    """One more than the largest id of a tokenizer, and that id's token."""
    tokenizer = _tokenizer(files, where)
    size = tokenizer.vocabulary_size
    return size, tokenizer.backend.id_to_token(size - 1)


def _tokenizer(files: Files, where: Path, chat_template: str = "", date: str = "") -> Tokenizer:
    """The tokenizer of these files; messages name `where`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(data)
        try:
            tokenizer = load_tokenizer(folder, chat_template, date)
        except UserError as error:
            raise UserError(str(error).replace(folder, str(where))) from error
    return dataclasses.replace(tokenizer, name=str(where))


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _names(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The names of a folder's files that the patterns mean, links out of it aside."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [
        file.relative_to(folder).as_posix()
        for file in files
        if file.is_file() and stays_inside(folder, file)
    ]


def _tell_links(folder: Path) -> None:
    for file in sorted({file for pattern in ALL for file in folder.glob(pattern)}):
        if file.is_file() and not stays_inside(folder, file):
            print(f"jaxft: {file} is a link out of its folder: not copied", file=sys.stderr)


def _found(folder: Path, patterns: Iterable[str]) -> Files:
    return {name: read_bytes(folder / name, MAX_BYTES) for name in _names(folder, patterns)}


def _config(files: Files) -> dict[str, Any]:
    """tokenizer_config.json, as far as it is one: whoever reads the folder judges it."""
    try:
        written = json.loads(files.get(CONFIG, b"{}"))
    except ValueError:
        return {}
    return written if isinstance(written, dict) else {}


def _templates(files: Files) -> Files:
    """The chat templates, each as a file of its own; files count before tokenizer_config.json, as in transformers."""
    if found := {name: data for name, data in files.items() if _is(name, TEMPLATES)}:
        return found
    written = _config(files).get("chat_template")
    if isinstance(written, str):
        return {TEMPLATE: written.encode()}
    named = written if isinstance(written, list) else []
    texts = {
        one["name"]: one["template"]
        for one in named
        if isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("name", "template"))
    }
    return {
        TEMPLATE
        if name == "default"
        else f"additional_chat_templates/{Path(name).name}.jinja": text.encode()
        for name, text in texts.items()
    }


def _without_template(config: bytes) -> Files:
    """tokenizer_config.json without its chat template, where it has one."""
    written = _config({CONFIG: config})
    if "chat_template" not in written:
        return {CONFIG: config}
    del written["chat_template"]
    return {CONFIG: (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()}
