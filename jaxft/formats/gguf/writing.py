"""`jaxft export --format gguf`: a model or an adapter as llama.cpp's file, and an Ollama Modelfile beside it."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jaxft.assets import model_folder
from jaxft.errors import UserError, counted, named
from jaxft.formats.adapter_config import read_adapter_config
from jaxft.formats.adapter_file import open_adapter
from jaxft.formats.companions import check_tokens, merged_tokenizer
from jaxft.formats.config_file import model_config
from jaxft.formats.gguf.architectures import Architecture
from jaxft.formats.gguf.modelfile import modelfile
from jaxft.formats.gguf.reading import names_in_file
from jaxft.formats.gguf.settings import architecture_for, check_said, settings_of
from jaxft.formats.gguf.words import tokenizer_metadata
from jaxft.formats.huggingface import HEAD, load
from jaxft.formats.manifest import tell_another_base
from jaxft.formats.naming import names_in
from jaxft.formats.peft import load_adapter
from jaxft.formats.peft_tensors import adapters_in, tied_head_name
from jaxft.formats.safetensors import Lazy
from jaxft.formats.trained_base import load_trained_base
from jaxft.formats.writing import dense_tensors
from jaxft.models.config import Config
from jaxft.models.initial import initial_params
from jaxft.models.transformer import Transformer, fitted
from jaxft.runtime.storage import fetched, free_bytes
from jaxft.tree import PyTree

Kind = gguf.GGMLQuantizationType
KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
IN_FULL = ("_norm.weight", "position_embd.weight")  # these llama.cpp reads in float32
# What a file calls its most frequent packing: numbers of llama.cpp's `llama_ftype`.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}


def export_gguf(
    model: str | Path,
    output: str | Path,
    adapter: str | Path = "",
    *,
    kind: str = "f16",
    merged: bool = False,
) -> Path:
    """Writes a model, a model with its adapter merged into it, or an adapter alone; and OUTPUT's Modelfile.

    Args:
        model: the base.
        output: a file that is new; the Modelfile stands beside it under its name with `.Modelfile`.
        adapter: a PEFT folder; "" for none.
        kind: how kernels are packed: f16 | q8_0 | f32. Norms and biases are float32, and so is an adapter alone.
        merged: merge the adapter. By default it is written alone, for a base in GGUF.

    Returns:
        The file.

    Raises:
        UserError: an architecture, a shape or a tokenizer that llama.cpp's files cannot say, an adapter that is no LoRA
            of kernels alone, numbers beyond float16, or a file that stands there.
    """
    target, beside = _new_file(output)
    folder = model_folder(model, weights=merged or not adapter)
    if adapter and not merged:
        text = _write_adapter(folder, fetched(adapter), target)
    else:
        text = _write_model(folder, fetched(adapter) if adapter else None, target, kind)
    beside.write_text(text, encoding="utf-8")
    print(f"wrote {target} and {beside}", file=sys.stderr)
    return target


def _new_file(output: str | Path) -> tuple[Path, Path]:
    target = Path(output)
    beside = target.with_name(f"{target.name}.Modelfile")
    for path in (target, beside):
        if path.exists():
            raise UserError(f"{path}: stands there; jaxft overwrites nothing: name a new file")
    if not target.parent.is_dir():
        raise UserError(f"{target}: no such folder: {target.parent}")
    return target, beside


def _write_model(folder: Path, adapter: Path | None, target: Path, kind: str) -> str:
    config = model_config(folder)
    name, row = architecture_for(config, str(folder))
    tokenizer = merged_tokenizer(folder, adapter)
    module, params = _merged_tree(folder, adapter)
    tensors = dense_tensors(module.config, params)
    config = dataclasses.replace(module.config, tied=HEAD not in tensors)
    spelled = names_in_file(name, config.layers)
    said, beside = settings_of(config, name)
    metadata = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": folder.resolve().name if adapter is None else adapter.resolve().name,
        "general.file_type": FILE_TYPES[kind],
        **said,
    }
    names = {tensor: spelled(tensor) for tensor in tensors}
    check_said(config, metadata, list(names.values()), beside, str(folder))
    metadata |= tokenizer_metadata(tokenizer, config.vocabulary, row.tokenizer)
    packed = {
        names[tensor]: _packed(names[tensor], tensor, lazy, row, config, kind)
        for tensor, lazy in tensors.items()
    }
    packed |= {name: (Kind.F32, _lazy(array)) for name, array in beside.items()}
    _write(target, metadata, packed)
    return modelfile(f"FROM ./{target.name}\n", tokenizer, adapter or folder)


def _merged_tree(folder: Path, adapter: Path | None) -> tuple[Any, PyTree]:
    if adapter is None:
        return load(folder)
    tell_another_base(adapter, folder)
    module, params, _ = load_trained_base(folder, adapter)
    params = load_adapter(params, adapter)
    module = Transformer(fitted(module.config, params))
    check_tokens(folder, adapter, module.config.vocabulary)
    return module, params


def _packed(
    name: str, tensor: str, lazy: Lazy, row: Architecture, config: Config, kind: str
) -> tuple[Kind, Lazy]:
    """(how a tensor is packed, the tensor as llama.cpp lays its rows), made when it is written."""
    raw = {"num_attention_heads": config.heads, "num_key_value_heads": config.key_heads}
    shape = lazy.shape[::-1] if row.turns(tensor) else lazy.shape
    chosen = KINDS[kind]
    if len(shape) == 1 or name.endswith(IN_FULL):
        chosen = Kind.F32
    elif chosen is Kind.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]:
        chosen = Kind.F16

    def make() -> np.ndarray:
        array = np.ascontiguousarray(row.unfolded(tensor, lazy.make(), raw), np.float32)
        limit = float(np.finfo(np.float16).max)
        if chosen is Kind.F16 and not np.abs(array).max(initial=0.0) <= limit:
            raise UserError(f"{name} holds numbers beyond float16: --type f32")
        return array

    return chosen, Lazy(shape, np.dtype(np.float32), make)


def _write_adapter(folder: Path, adapter: Path, target: Path) -> str:
    """A LoRA alone: its file's scale is alpha / rank, and what its own differs from that goes into b."""
    config = model_config(folder)
    name, row = architecture_for(config, str(folder))
    tell_another_base(adapter, folder)
    _check_lora(adapter)
    shapes = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    tree = load_adapter(shapes, adapter)
    _, adapted = adapters_in(tree, names_in(tree, None) | tied_head_name(tree))
    ranks = [one.rank for one in adapted.values()]
    alpha = max(set(ranks), key=ranks.count)
    spelled = names_in_file(name, config.layers)
    raw = {"num_attention_heads": config.heads, "num_key_value_heads": config.key_heads}
    tensors: dict[str, tuple[Kind, Lazy]] = {}
    for module, one in adapted.items():
        a, b = _parts(one.parts)
        scaled = b.make().astype(np.float32) * np.float32(one.scale * one.rank / alpha)
        kernel = spelled(f"{module}.weight")
        tensors[f"{kernel}.lora_a"] = (Kind.F32, _lazy(a.make().astype(np.float32)))
        laid = row.permute(f"{module}.weight", scaled, raw)
        tensors[f"{kernel}.lora_b"] = (Kind.F32, _lazy(laid))
    metadata = {
        "general.architecture": name,
        "general.type": "adapter",
        "general.name": adapter.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    _write(target, metadata, tensors)
    tokenizer = merged_tokenizer(folder, adapter)
    head = f"# The base in GGUF: jaxft export --model {folder} --format gguf --output base.gguf\nFROM ./base.gguf\n"
    return modelfile(f"{head}ADAPTER ./{target.name}\n", tokenizer, adapter)


def _check_lora(adapter: Path) -> None:
    """UserError where a folder holds more than LoRA of kernels: that is all that llama.cpp's adapter files hold."""
    read_adapter_config(adapter)
    for name in open_adapter(adapter):
        if not re.search(r"\.lora_[AB](\.|$)", name):
            raise UserError(
                f"{adapter}: llama.cpp's adapter files hold LoRA of kernels alone, and this holds {named(name)}: "
                "--merge writes the whole model"
            )


def _parts(parts: Mapping[str, Lazy]) -> tuple[Lazy, Lazy]:
    """(a (rank, in), b (out, rank)) as PEFT names them."""
    found = {name.split(".")[0]: part for name, part in parts.items()}
    return found["lora_A"], found["lora_B"]


def _lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: np.ascontiguousarray(array))


def _write(
    target: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Kind, Lazy]]
) -> None:
    """Writes a file, one tensor at a time; it appears under its name when it is whole."""
    part = target.with_name(f".{target.name}.part")
    writer = gguf.GGUFWriter(part, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType
            kinds = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kinds[type(value)])
    need = 0
    for name, (packing, lazy) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[packing]
        octets = math.prod(lazy.shape) // block * size
        shape = lazy.shape
        quantized = packing not in (Kind.F32, Kind.F16)
        if quantized:
            shape = (*shape[:-1], shape[-1] // block * size)
        dtype = np.dtype(
            np.uint8 if quantized else np.float16 if packing is Kind.F16 else np.float32
        )
        writer.add_tensor_info(name, shape, dtype, octets, raw_dtype=packing)
        need += octets
    if (free := free_bytes(target.parent)) < need:
        raise UserError(f"{target}: takes {need:,} bytes, and {free:,.0f} are free there")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for packing, lazy in tensors.values():
            writer.write_tensor_data(gguf.quantize(lazy.make(), packing))
        writer.close()
        part.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    print(f"{target.name}: {counted(len(tensors), 'tensor')}, {need:,} bytes", file=sys.stderr)
