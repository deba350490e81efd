"""A model folder's tokenizer: the ids of its tokenizer.json, as it stands, and its special tokens.

transformers 4 gives these ids, and so does transformers 5 by the classes that use tokenizer.json as it stands. Some of
the classes of transformers 5 (LlamaTokenizer, Qwen2Tokenizer, GemmaTokenizer, GPT2Tokenizer, ...) take its vocabulary
alone and rebuild the rest: where tokenizer.json holds another pipeline than the class builds, their ids differ.
tokenizer.json holds here, because it is what the model was trained with and what other programs read, while what a
class builds changes with the version of transformers. The log says so where ids differ, with an example (`rebuilt`).
The special tokens are those that transformers 5 takes (`special_tokens`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxft.assets import chat_templates, model_folder
from jaxft.data.literal import OPEN, encode_marked, pattern_of
from jaxft.data.rebuilt import REBUILT, class_of, is_byte_level, tell_where_ids_differ
from jaxft.data.special_tokens import special_tokens
from jaxft.errors import UserError, nearest, shown
from jaxft.runtime.sandbox import check_moment
from jaxft.runtime.untrusted import read_bytes, read_json, read_text

MAX_BYTES = 100_000_000  # of tokenizer.json; the largest have about 35 MB
# Used only where no file of the folder names the token, in this order.
USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
USUAL_EOS = ("</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, and what the ids of a model's special tokens are.

    Attributes:
      backend: the `tokenizers` pipeline of tokenizer.json; its post-processor alone decides which
        special tokens `encode` adds, as in transformers.
      special_tokens: text of the named tokens ("bos_token": "<s>"), as a chat template sees them.
      bos_id, eos_id: None if the folder has none. They may have an id and no name in `special_tokens`: a template
        then writes nothing for `{{ eos_token }}`.
      eos_ids: every id that ends a generation, `eos_id` first; the others are named by
        generation_config.json or config.json (Llama 3: <|end_of_text|> and <|eot_id|>).
      pad_id: fills unused positions, which belong to no segment. It falls back to `eos_id`: a trained
        EOS stays trained, because padding is told by segments and never by this id.
      chat_template: Jinja source, or None.
      tool_template: the same for conversations with tools, where the folder has one of its own.
      name: the folder, for messages.
      date: what a template takes for the present moment, an ISO date or date and time; "": the present one.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None
    name: str
    tool_template: str | None = None
    date: str = ""

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def writes_date(self) -> bool:
        """Whether a chat template of it asks what day it is."""
        sources = (self.chat_template, self.tool_template)
        return any("strftime_now" in source for source in sources if source)

    @property
    def eos_text(self) -> str | None:
        """What `eos_id` is written as."""
        return None if self.eos_id is None else str(self.backend.id_to_token(self.eos_id))

    @functools.cached_property
    def added_tokens(self) -> re.Pattern[str] | None:
        """Finds what a text must not hold where it is data: special tokens, and others added to the vocabulary."""
        return pattern_of(self.backend)

    def with_tokens(self, texts: Sequence[str], where: str) -> Tokenizer:
        """The tokenizer in which each text is one token: those that it lacks get the next ids, in their order.

        They are no special tokens (transformers' `tokenizer.add_tokens`): decoding writes them.

        Raises UserError, which begins with `where`, for an empty text and one that is there twice.
        """
        for number, text in enumerate(texts):
            if not text or text in texts[:number]:
                what = "is there twice" if text else "is empty"
                raise UserError(f"{where}: the token {shown(text)} {what}")
        with refusing_panics(self.name):
            backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
            backend.encode_special_tokens = self.backend.encode_special_tokens
            lacking = [text for text in texts if backend.token_to_id(text) is None]
            backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in lacking])
        return dataclasses.replace(self, backend=backend)

    def ids_of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """The ids of tokens that are there."""
        found = [self.backend.token_to_id(text) for text in texts]
        return tuple(token for token in found if token is not None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; a BOS that the text already begins with is not added again."""
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel. What `literal` marks in them is text, and no special token."""
        if any(OPEN in text for text in texts):
            with refusing_panics(self.name):
                return [
                    encode_marked(self.backend, text, add_special_tokens, self.added_tokens)
                    if OPEN in text
                    else self.encode(text, add_special_tokens)
                    for text in texts
                ]
        with refusing_panics(self.name):
            encodings = self.backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        return [self._without_doubled_bos(encoding.ids, text, add_special_tokens)
                for encoding, text in zip(encodings, texts, strict=True)]  # fmt: skip

    def _without_doubled_bos(self, ids: list[int], text: str, added: bool) -> list[int]:
        if not added or self.bos_id is None or ids[:2] != [self.bos_id, self.bos_id]:
            return ids
        # Only the BOS of the post-processor goes: one that the user wrote twice was meant.
        return ids[1:] if text.startswith(str(self.backend.id_to_token(self.bos_id))) else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        with refusing_panics(self.name):
            return self.backend.decode(
                [int(i) for i in ids], skip_special_tokens=skip_special_tokens
            )


@contextlib.contextmanager
def refusing_panics(where: str) -> Iterator[None]:
    """Tells what the Rust side raises, a bare Exception or a panic (no Exception), as a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error)[:2000].split())[:200]
        raise UserError(f"{where}: not a tokenizer that `tokenizers` can use: {reason}") from error


def load_tokenizer(folder: str | Path, chat_template: str = "", date: str = "") -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder; tokenizer.json is enough.

    Special tokens are named as `special_tokens` says. Where nothing names a BOS or EOS and nothing sets it to null, an
    id in generation_config.json or config.json stands in for it if it is an added token, else a usual name among the
    added tokens ("</s>", "<|endoftext|>"); a null EOS leaves the ids of those files alone.

    Args:
      folder: where tokenizer.json stands.
      chat_template: "" for the folder's own (chat_template.jinja before tokenizer_config.json), the
        name of one of several that the folder has, the path of a Jinja file, the name of one of
        jaxft's (`chat_templates`), or the template itself.
      date: what the template takes for the present moment, an ISO date or date and time; "": the present one.

    Raises:
      UserError: a file is missing or cannot be read, `chat_template` names nothing, or `date` is none.
    """
    folder = model_folder(folder, weights=False)
    check_moment(date, "date")
    backend = _read_backend(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    model = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    mapped = _read_json(folder / "special_tokens_map.json")
    listed = _read_json(folder / "added_tokens.json")
    kind = class_of(settings, model, is_byte_level(backend))
    defaults = REBUILT[kind].defaults if kind else {}
    lacking = {text for text in defaults.values() if text and backend.token_to_id(text) is None}
    with refusing_panics(str(folder)):
        special = special_tokens(
            settings, mapped, listed, backend.get_added_tokens_decoder(), defaults, str(folder)
        )
        special.add_to(backend)
        backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
        if kind:
            tell_where_ids_differ(kind, backend, settings, special, str(folder))
    # A default that the vocabulary lacks is a token that the model never saw: none to end or to fill with.
    named = {
        name: int(found)
        for name, text in special.named.items()
        if (found := backend.token_to_id(text)) is not None
        and (name == "bos_token" or text not in lacking or name in settings or name in mapped)
    }
    configs = (generation, model)
    bos_id, _ = _own_id("bos", named, special.unset, backend, configs, folder)
    eos_id, eos_ids = _own_id("eos", named, special.unset, backend, configs, folder)
    template, tool_template = _chat_templates(folder, settings, chat_template)
    return Tokenizer(
        backend=backend,
        special_tokens=special.named,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=tuple(dict.fromkeys((*(() if eos_id is None else (eos_id,)), *eos_ids))),
        pad_id=named.get("pad_token", eos_id or 0),
        chat_template=template,
        tool_template=tool_template,
        name=str(folder),
        date=date,
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path.parent}: no tokenizer.json there; jaxft reads no other tokenizer")
    with refusing_panics(str(path)):
        backend = tokenizers.Tokenizer.from_str(read_bytes(path, MAX_BYTES).decode("utf-8"))
    backend.no_truncation()
    backend.no_padding()
    with refusing_panics(str(path)):  # a post-processor, say, that names a token it lacks
        backend.encode("a b 1")
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _config_ids(kind: str, configs: Iterable[dict[str, Any]], size: int, folder: Path) -> list[int]:
    """What `kind`_token_id names in the model's files: one id, or a list of them."""
    ids: list[int] = []
    for written in configs:
        value = written.get(f"{kind}_token_id")
        listed = value if isinstance(value, list) else [value] if value is not None else []
        if not all(type(i) is int for i in listed):
            raise UserError(f"{folder}: {kind}_token_id must be an integer, not {shown(value)}")
        # A config copied from a larger model may name an id that this vocabulary lacks.
        ids += [i for i in listed if 0 <= i < size]
    return ids


def _own_id(
    short: str,
    named: Mapping[str, int],
    unset: Container[str],
    backend: tokenizers.Tokenizer,
    configs: Iterable[dict[str, Any]],
    folder: Path,
) -> tuple[int | None, list[int]]:
    """(id of the tokenizer's BOS or EOS, what the model's files say): named, else by those files, else by a usual name.

    Llama's config says 1 and 2 where nobody set them, and those are letters in other vocabularies:
    an id that is no added token counts only if nothing better is found.
    """
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    listed = _config_ids(short, configs, size, folder)
    name = f"{short}_token"
    if name in named:
        return named[name], listed
    sure = [i for i in listed if i in added.values()]
    if name in unset:
        return (sure[0] if sure and short == "eos" else None), listed
    usual = USUAL_BOS if short == "bos" else USUAL_EOS
    found = [*sure, *[added[text] for text in usual if text in added], *listed]
    return (found[0] if found else None), listed


def _chat_templates(
    folder: Path, declared: dict[str, Any], wanted: str
) -> tuple[str | None, str | None]:
    """The template's source, of the folder, of jaxft, of a file or written out; and that for tools."""
    entry = declared.get("chat_template")
    named = {"default": entry} if isinstance(entry, str) else {}
    if isinstance(entry, list):
        named = {
            item["name"]: item["template"]
            for item in entry
            if isinstance(item, dict) and isinstance(item.get("template"), str) and "name" in item
        }
    files = {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    named |= {name: read_text(path) for name, path in files.items()}
    if not wanted:
        return named.get("default"), named.get("tool_use")
    if wanted in named:
        return named[wanted], None
    if "{{" in wanted or "{%" in wanted:
        return wanted, None
    if Path(wanted).is_file():
        return read_text(Path(wanted)), None
    if wanted in chat_templates():
        return read_text(chat_templates()[wanted]), None
    known = (*named, *chat_templates())
    raise UserError(
        f"chat_template {wanted!r}: neither a file nor one of the templates of {folder}, which has "
        f"{', '.join(named) or 'none'}, or of jaxft: {', '.join(chat_templates())}"
        f"{nearest(wanted, known)}"
    )
