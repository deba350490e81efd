"""Which special and added tokens a folder names, in the order of precedence of transformers 5.

1. tokenizer_config.json, a null included; its `added_tokens_decoder`, if the key is there, are the added tokens.
2. Only without that key: special_tokens_map.json, which then goes before it, nulls included; added_tokens.json and
   the added tokens of tokenizer.json.
3. What neither names: the defaults of the tokenizer's class (`rebuilt`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from jaxft.errors import UserError, shown

NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
EXTRA = "extra_special_tokens"
OLD_EXTRA = "additional_special_tokens"
DECODER = "added_tokens_decoder"
Token = tokenizers.AddedToken
PARTS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What a folder says of its special tokens.

    Attributes:
      named: {"bos_token": "<s>"}: those that have a name, as a chat template sees them.
      unset: the names that the folder sets to null.
      added: the tokens that are added to those of tokenizer.json, in that order, or take other settings.
      mentioned: the texts of all added tokens that a class knows which does not read those of tokenizer.json.
    """

    named: dict[str, str]
    unset: frozenset[str]
    added: tuple[Token, ...]
    mentioned: frozenset[str]

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Adds the tokens: a new one gets the next id, one that is there takes the settings that it has here."""
        backend.add_tokens(list(self.added))


def special_tokens(
    settings: Mapping[str, Any],
    mapped: Mapping[str, Any],
    added: Mapping[str, Any],
    listed: Mapping[int, Token],
    defaults: Mapping[str, str | None],
    where: str,
) -> SpecialTokens:
    """What the files of a folder say together.

    Args:
      settings: tokenizer_config.json; {} for none, as the next two.
      mapped: special_tokens_map.json.
      added: added_tokens.json.
      listed: the added tokens of tokenizer.json by id.
      defaults: {name: text} of the class, where nothing names them.
      where: the folder, for messages.
    """
    values, further, texts = _values(settings, {} if DECODER in settings else mapped)
    if DECODER in settings:
        decoder = {
            _index(key, where): _token(value, f"{where}/tokenizer_config.json: {DECODER}")
            for key, value in _object(settings[DECODER], where).items()
        }
    else:
        decoder = {
            int(index): Token(text, special=text in texts, normalized=text not in texts)
            for text, index in added.items()
            if type(index) is int
        }
        decoder |= listed
    values = {**defaults, **values}
    by_text = {token.content: token for token in decoder.values()}
    found: dict[str, Token] = {}
    for name in (*NAMED, *[name for name in values if name not in NAMED]):
        if values.get(name) is not None:
            token = _token(values[name], f"{where}: {name}")
            found[name] = by_text.get(token.content, token)
    extra = [_token(value, f"{where}: {EXTRA}") for value in further]
    return SpecialTokens(
        named={name: token.content for name, token in found.items()},
        unset=frozenset(name for name in NAMED if name in values and values[name] is None),
        added=_in_order(decoder, found.values(), extra, listed),
        mentioned=frozenset(
            token.content for token in (*decoder.values(), *found.values(), *extra)
        ),
    )


def _values(
    settings: Mapping[str, Any], mapped: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any], set[Any]]:
    """({name: a text, an added token or null}, further tokens, the texts that added_tokens.json has as special ones).

    Of the names that a model has for itself ("image_token"), a text of tokenizer_config.json goes before the map. The
    further tokens stand under two keys, of which the older counts where the newer is empty, or names tokens.
    """
    own = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in NAMED and isinstance(value, str | dict)
    }
    explicit = {name: value for name, value in own.items() if isinstance(value, str)}
    lists = {key: settings[key] for key in (EXTRA, OLD_EXTRA) if key in settings}
    if OLD_EXTRA in lists and not lists.get(EXTRA):
        lists[EXTRA] = lists.pop(OLD_EXTRA)
    explicit |= _taken(lists)
    if OLD_EXTRA in mapped:
        lists[OLD_EXTRA] = mapped[OLD_EXTRA]
    if isinstance(mapped.get(EXTRA), list):
        before = list(lists.get(EXTRA) or ())
        lists[EXTRA] = before + [value for value in mapped[EXTRA] if value not in before]
    elif EXTRA in mapped:
        lists[EXTRA] = mapped[EXTRA]
        explicit |= _taken(lists)
    named = {name: settings[name] for name in NAMED if name in settings}
    named |= own | {name: value for name, value in mapped.items() if name.endswith("_token")}
    special = {_text(named[name]) for name in NAMED if named.get(name)}
    special |= {_text(value) for value in lists.get(EXTRA) or ()}
    further = lists[EXTRA] if EXTRA in lists else lists.get(OLD_EXTRA)
    return named | explicit, list(further or ()), special


def _taken(lists: dict[str, Any]) -> dict[str, Any]:
    """Further tokens that have names, taken out of the lists."""
    return dict(lists.pop(EXTRA)) if isinstance(lists.get(EXTRA), dict) else {}


def _in_order(
    decoder: Mapping[int, Token],
    named: Iterable[Token],
    extra: Iterable[Token],
    listed: Mapping[int, Token],
) -> tuple[Token, ...]:
    """Those of the decoder by their ids, then the named ones and the further ones that are no added tokens yet."""
    named = tuple(named)
    special = {token.content for token in named}
    tokens = [decoder[index] for index in sorted(decoder)]
    there = {token.content for token in (*tokens, *listed.values())}
    for token in (*named, *extra):
        if token.content not in there:
            tokens.append(token)
            there.add(token.content)
    return tuple(_special(token) if token.content in special else token for token in tokens)


def _special(token: Token) -> Token:
    parts = {name: getattr(token, name) for name in PARTS} | {"special": True}
    return token if token.special else Token(**parts)


def _token(value: Any, where: str) -> Token:
    """An added token, of a text or of an object {"content": ..., "lstrip": ...}."""
    if isinstance(value, Token):
        return value
    if isinstance(value, str):
        return Token(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(
            f"{where}: {shown(value)} is no token: a text, or an object with its content"
        )
    try:
        return Token(**{name: value[name] for name in PARTS if name in value})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {shown(value)} is no token: {str(error)[:100]}") from error


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _object(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{where}/tokenizer_config.json: {DECODER} is {shown(value)}, and no object"
        )
    return value or {}


def _index(key: str, where: str) -> int:
    try:
        return int(key)
    except ValueError as error:
        raise UserError(
            f"{where}/tokenizer_config.json: {DECODER}: {shown(key)} is no id"
        ) from error
