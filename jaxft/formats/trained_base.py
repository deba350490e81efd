"""How something was trained: on chats or on texts, and an adapter over which base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.formats.config_file import read_config
from jaxft.formats.huggingface import load
from jaxft.formats.manifest import NAME, TRAINED_ON, read_manifest
from jaxft.formats.peft_writing import read_quantization
from jaxft.formats.prequantized import quantization_settings
from jaxft.formats.safetensors import open_folder
from jaxft.models.transformer import Transformer
from jaxft.quantizing import quantization_of
from jaxft.tree import PyTree

TEMPLATE = "chat_template.jinja"
SETTINGS = ("scheme", "group_size", "double_quant")


def load_trained_base(
    folder: Path, adapter: Path, dtype: str = "float32"
) -> tuple[Transformer, PyTree, str]:
    """`load` of the base that the adapter stands on.

    A folder that is quantized itself is read as it is. A dense one is rounded in the dtype that gives the codes which
    the card tells of: the weights may have lain in another than `dtype` while the adapter was trained.

    Args:
        folder: of the base, or of the dense model that it was made of.
        adapter: a PEFT folder.
        dtype: of the computation, and of what is not quantized, if the codes can be had so.

    Returns:
        (model, params, what the base lies in now: "nf4", or "" for a dense one).

    Raises:
        UserError: the card tells of another quantized base than this folder gives.
    """
    trained = read_quantization(adapter)
    if trained is not None and not {*SETTINGS, "digest"} <= trained.keys():
        raise UserError(f"{adapter}/README.md: does not say how the base was quantized: {trained}")
    if trained is None or quantization_settings(read_config(folder), str(folder)) is not None:
        model, params = load(folder, dtype=dtype)
        found = quantization_of(params)
        if trained is not None and found != trained:
            raise another_base(adapter, folder, trained, found)
        return model, params, found["scheme"] if found else ""
    scheme = trained["scheme"]
    options = {"group_size": trained["group_size"], "double_quant": trained["double_quant"]}
    found = None
    for kind in _dtypes(folder, dtype):
        model, params = load(folder, dtype=dtype, param_dtype=kind, quantize=scheme, **options)
        found = quantization_of(params)
        if found == trained:
            return model, params, scheme
        del params
    raise another_base(adapter, folder, trained, found)


def another_base(
    adapter: Path, folder: Path, trained: Mapping[str, Any], found: Mapping[str, Any] | None
) -> UserError:
    """That the adapter was trained over another base than the folder gives."""
    return UserError(
        f"{adapter}: was trained over another base: {_said(trained)}; {folder} gives {_said(found)}"
    )


def _dtypes(folder: Path, dtype: str) -> list[str]:
    """The dtypes in which the kernels may have been rounded, the wanted one first."""
    kinds = list(dict.fromkeys((dtype, "float32", "bfloat16", "float16")))
    if {tensor.dtype for tensor in open_folder(folder).values()} == {"BF16"}:
        kinds.remove("bfloat16" if dtype == "float32" else "float32")  # the same numbers
    return kinds


def _said(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "a dense one"
    scheme, group, digest = (quantization[key] for key in ("scheme", "group_size", "digest"))
    return f"{scheme} in groups of {group}, digest {digest}"


def trained_on_chats(folder: Path) -> bool | None:
    """Whether an adapter or a model was trained on chats; None where nothing says so.

    jaxft's manifest says it. An adapter of another maker that brings a chat template was, most likely.
    """
    said = read_manifest(folder).get(TRAINED_ON) if (folder / NAME).exists() else None
    if said in ("chats", "texts"):
        return bool(said == "chats")
    is_adapter = (folder / "adapter_config.json").is_file()
    return True if is_adapter and (folder / TEMPLATE).is_file() else None
