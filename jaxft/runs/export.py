"""What a run leaves: RUN/adapter in PEFT's format, or RUN/model, a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.adaptation import base_tree, merge, moved_base
from jaxft.assets import model_folder
from jaxft.data import Tokenizer
from jaxft.formats import save, save_adapter
from jaxft.formats.companions import Files, changes, trained_with
from jaxft.formats.manifest import TRAINED_ON, note, put
from jaxft.methods import Method
from jaxft.models import Transformer
from jaxft.runs.folder import replaced, written
from jaxft.runtime.storage import fetched
from jaxft.tree import PyTree


def export(
    config: ConfigDict,
    model: Transformer,
    params: PyTree,
    method: Method,
    tokenizer: Tokenizer,
    logs: Path,
    workdir: Path,
    *,
    chats: bool,
) -> tuple[str, str]:
    """Writes the adapter, with the base that it stands on where the start was taken off it; or the model.

    Args:
        config: the run's configuration.
        model: the module.
        params: the whole tree.
        method: what adapted it.
        tokenizer: what it was trained by, which goes along where it is not the base's.
        logs: where it is written; each folder takes its place whole.
        workdir: RUN, where it stands in the end.
        chats: whether it was trained on chats, which is noted; their template goes along.

    Returns:
        The folder's name, and that of the base.
    """
    like = model_folder(config.model)
    name, base = ("adapter" if method.weight else "model"), config.model
    if moved_base(params):
        with written(logs / "base"), replaced(logs / "base") as folder:
            save(model, base_tree(params), folder, like=like)
        base = str(workdir / "base")
    with written(logs / name), replaced(logs / name) as folder:
        if method.weight:
            save_adapter(params, folder, method=method, base=base)
        else:
            save(model, merge(params), folder, like=like)
        put(folder, changes(folder, _asked_by(config, tokenizer, chats)))
        note(folder, **{TRAINED_ON: "chats" if chats else "texts"})
    return name, base


def _asked_by(config: ConfigDict, words: Tokenizer, chats: bool) -> Files:
    """What it was trained by, if that is not the base's: its tokenizer, and the templates of its chats."""
    tokenizer = model_folder(config.tokenizer, weights=False) if config.tokenizer else None
    if tokenizer is None and config.adapter:
        tokenizer = fetched(config.adapter)
    added = bool(config.data.add_tokens) and not config.adapter
    if added and tokenizer is None:
        tokenizer = model_folder(config.model, weights=False)
    by_template = chats or config.data.chat_template
    templates = (words.chat_template, words.tool_template) if by_template else (None, None)
    return trained_with(tokenizer, *templates, words if added else None)
