"""What `jaxft generate` and `jaxft chat` ask: a model folder, alone or with an adapter, as it was trained."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from jaxft.assets import model_folder
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError
from jaxft.formats import load, load_adapter
from jaxft.formats.companions import merged_tokenizer
from jaxft.formats.manifest import tell_another_base
from jaxft.formats.peft_writing import read_quantization
from jaxft.formats.trained_base import TEMPLATE, load_trained_base, trained_on_chats
from jaxft.models import Transformer
from jaxft.models.transformer import fitted
from jaxft.runtime.sandbox import check_moment
from jaxft.runtime.storage import fetched
from jaxft.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Words:
    """How a model is spoken to; known before its weights are read.

    Attributes:
        tokenizer: its tokenizer and templates, which are the adapter's where that has some.
        chats: whether it was trained on chats; None where nothing says so.
    """

    tokenizer: Tokenizer
    chats: bool | None


def open_words(
    model: str,
    adapter: str = "",
    *,
    tokenizer: str = "",
    chat_template: str = "",
    date: str = "",
) -> Words:
    """The tokenizer and template by which a model is asked.

    Args:
        model: a Hugging Face folder, or "tiny".
        adapter: a PEFT folder; "" for none.
        tokenizer: a folder with another tokenizer.json; "": that of the folder which `jaxft merge` would make: the
            adapter's where it has one, else the model's.
        chat_template: as of `load_tokenizer`; "": the adapter's, else the tokenizer's.
        date: likewise; "": the present moment.
    """
    check_moment(date, "--date")
    folder = model_folder(model)
    if tokenizer:
        words = load_tokenizer(tokenizer, chat_template or _own_template(adapter), date)
    else:
        words = merged_tokenizer(folder, fetched(adapter) if adapter else None, chat_template, date)
    return Words(words, trained_on_chats(fetched(adapter) if adapter else folder))


def open_model(model: str, adapter: str = "", dtype: str = "float32") -> tuple[Transformer, PyTree]:
    """Reads a model, and an adapter over the base that it was trained on, quantized if that was.

    Args:
        model: as of `open_words`.
        adapter: likewise.
        dtype: of weights and computation.
    """
    folder = model_folder(model)
    if not adapter:
        return load(folder, dtype=dtype)
    tell_another_base(fetched(adapter), folder)
    network, base, scheme = load_trained_base(folder, fetched(adapter), dtype)
    if scheme:
        known = ", as in training" if read_quantization(fetched(adapter)) else ""
        print(f"jaxft: the adapter's base lies in {scheme}{known}", file=sys.stderr)
    params = load_adapter(base, adapter, dtype=dtype)
    return Transformer(fitted(network.config, params)), params


def _own_template(adapter: str) -> str:
    own = fetched(adapter) / TEMPLATE if adapter else None
    return str(own) if own is not None and own.is_file() else ""


def as_chat(words: Words, chat: bool | None, system: str) -> bool:
    """Whether texts are asked as a user's messages: as the flags say, else as the model was trained.

    Raises:
        UserError: a chat without a template, or a system message without a chat.
    """
    has_template = words.tokenizer.chat_template is not None
    if chat is False and system:
        raise UserError("--system is a chat's: it does not go with --no-chat")
    wanted = bool(chat or system) if chat is not None or system else words.chats is True
    if wanted and not has_template:
        raise UserError(
            f"{words.tokenizer.name}: has no chat template, which a chat needs: --chat-template chatml takes one of "
            "jaxft's, --chat-template FILE one of yours"
        )
    return wanted


def tell_how(words: Words) -> None:
    """Says how texts are asked where no flag says it, once nothing stands in the way."""
    if words.chats:
        text = "it was trained on chats: each prompt is a user's message; --no-chat goes on from it as it stands"
    elif words.chats is None and words.tokenizer.chat_template is not None:
        text = "prompts are continued as they stand; --chat asks them through the model's chat template"
    else:
        return
    print(f"jaxft: {text}", file=sys.stderr)


def conversation(prompt: Any, system: str) -> list[dict[str, Any]]:
    """A prompt as messages: a text as the user's, and the system's first where there is none.

    >>> conversation("Hello", "Be brief.")
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'}]
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    has_own = bool(asked) and asked[0]["role"] in ("system", "developer")
    return asked if not system or has_own else [{"role": "system", "content": system}, *asked]
