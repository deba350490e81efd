"""A model folder's tokenizer, with the ids that transformers' AutoTokenizer gives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxft.assets import chat_templates, model_folder
from jaxft.confined import check_moment
from jaxft.errors import UserError, nearest, shown
from jaxft.files import read_bytes, read_json, read_text

MAX_BYTES = 100_000_000  # of tokenizer.json; the largest have about 35 MB
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
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
      bos_id, eos_id: None if the folder has none.
      eos_ids: every id that ends a generation, `eos_id` first; the others are named by
        generation_config.json or config.json (Llama 3: <|end_of_text|> and <|eot_id|>).
      pad_id: fills unused places, which belong to no segment. It falls back to `eos_id`: a trained
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

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; a BOS that the text already begins with is not added again."""
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        with refusing_panics(self.name):
            encodings = self.backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        return [self._without_doubled_bos(encoding.ids, text, add_special_tokens)
                for encoding, text in zip(encodings, texts, strict=True)]  # fmt: skip

    def _without_doubled_bos(self, ids: list[int], text: str, added: bool) -> list[int]:
        doubled = added and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]
        # Only the BOS of the post-processor goes: one that the user wrote twice was meant.
        if doubled and text.startswith(self.special_tokens["bos_token"]):
            return ids[1:]
        return ids

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

    Special tokens come from tokenizer_config.json and special_tokens_map.json. Where these name no
    BOS or EOS, an id in generation_config.json or config.json counts if it is an added token, else
    a usual name among the added tokens ("</s>", "<|endoftext|>").

    Args:
      folder: where tokenizer.json stands.
      chat_template: "" for the folder's own (chat_template.jinja before tokenizer_config.json), the
        name of one of several that the folder has, the path of a Jinja file, the name of one of
        jaxft's (`chat_templates`), or the template itself.
      date: what the template takes for the present moment, an ISO date or date and time; "": the present one.

    Raises:
      UserError: a file is missing or cannot be read, `chat_template` names nothing, or `date` is none.
    """
    folder = model_folder(folder)
    check_moment(date, "date")
    backend = _read_backend(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    model = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    special_tokens = _special_tokens(settings, _read_json(folder / "special_tokens_map.json"))
    with refusing_panics(str(folder)):
        _add_missing_tokens(backend, settings, special_tokens, folder)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    size = max(vocabulary.values(), default=-1) + 1
    ids = {name: vocabulary[text] for name, text in special_tokens.items()}
    bos_ids = _config_ids("bos", (generation, model), size, folder)
    eos_ids = _config_ids("eos", (generation, model), size, folder)
    bos_id = _own_id(ids.get("bos_token"), bos_ids, USUAL_BOS, added)
    eos_id = _own_id(ids.get("eos_token"), eos_ids, USUAL_EOS, added)
    for name, found in (("bos_token", bos_id), ("eos_token", eos_id)):
        if found is not None:
            special_tokens.setdefault(name, str(backend.id_to_token(found)))
    template, tool_template = _chat_templates(folder, settings, chat_template)
    return Tokenizer(
        backend=backend,
        special_tokens=special_tokens,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=() if eos_id is None else tuple(dict.fromkeys((eos_id, *eos_ids))),
        pad_id=ids.get("pad_token", eos_id or 0),
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


def _special_tokens(*files: dict[str, Any]) -> dict[str, str]:
    """Text of the named tokens; an earlier file wins."""
    found: dict[str, str] = {}
    for name in NAMED_TOKENS:
        for content in files:
            token = content.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _add_missing_tokens(
    backend: tokenizers.Tokenizer,
    settings: dict[str, Any],
    special_tokens: dict[str, str],
    folder: Path,
) -> None:
    """Adds the tokens that the other files name and tokenizer.json lacks, as transformers does."""
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        entries = [decoder[key] for key in sorted(decoder, key=int)]
        tokens = [tokenizers.AddedToken(**entry) for entry in entries]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/tokenizer_config.json: added_tokens_decoder: {error}") from error
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    for text in special_tokens.values():
        if backend.token_to_id(text) is None:
            backend.add_special_tokens([text])


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
    named: int | None, config_ids: list[int], usual: tuple[str, ...], added: dict[str, int]
) -> int | None:
    """Id of the tokenizer's BOS or EOS: named, else by the config, else by a usual name.

    Llama's config says 1 and 2 where nobody set them, and those are letters in other vocabularies:
    an id that is no added token counts only if nothing better is found.
    """
    sure = [i for i in config_ids if i in added.values()]
    usually = [added[text] for text in usual if text in added]
    found = [named] if named is not None else [*sure, *usually, *config_ids]
    return found[0] if found else None


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
