"""`jaxft merge` and `jaxft quantize`: a folder made of another, and how far its logits are from the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adaptation import merge
from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats.companions import check_tokens
from jaxft.formats.huggingface import load
from jaxft.formats.manifest import TRAINED_ON, note, tell_another_base
from jaxft.formats.peft import load_adapter
from jaxft.formats.peft_writing import read_quantization
from jaxft.formats.safetensors import open_folder
from jaxft.formats.trained_base import trained_on_chats
from jaxft.formats.writing import save, write_model
from jaxft.models.transformer import Transformer
from jaxft.places import fetched
from jaxft.quantization import quantization_of, quantize_params
from jaxft.tree import PyTree

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}


def merge_folder(
    model: str | Path, adapter: str | Path, output: str | Path, quantize: str = "none"
) -> float:
    """Writes base and adapter as one folder, in the base's dtype and layout, and measures it.

    The merged folder is read back and its logits are compared, in float32, with those of base and
    adapter: the rounding to the stored dtype is part of the deviation. An adapter that was trained over a quantized
    base is merged into that base's dequantized values. What stands beside the adapter (tokenizer, chat template,
    generation settings) comes along, before what stands beside the base.

    Args:
        model: the base's folder; the dense one of a quantized base will do.
        adapter: a PEFT folder.
        output: a new or empty folder.
        quantize: none, or the scheme to write the merged projections in: nf4 | fp4 | int8.

    Returns:
        The largest deviation of the logits, relative to the largest logit.

    Raises:
        UserError: the adapter was trained over another quantized base, or its tokenizer has tokens that the base lacks.
    """
    model = model_folder(model)
    adapter = fetched(adapter)
    module, params = _trained_base(model, adapter)
    check_tokens(model, adapter, module.config.vocabulary)
    adapted = load_adapter(params, adapter)
    expected = _logits(module, adapted)
    dtypes = {NAMES[t.dtype] for t in open_folder(model).values() if t.dtype in NAMES}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    if quantize == "none":
        write_model(
            module.config, adapted, output, like=model, beside=adapter, dtype=dtype, dense=True
        )
        print(f"wrote {output} in {dtype}")
    else:
        merged = merge(adapted)
        _report("merged, dense,", _logits(module, merged), expected)
        save(module, _requantized(merged, quantize), output, like=model, beside=adapter)
        print(f"wrote {output} in {quantize}")
    if (chats := trained_on_chats(fetched(adapter))) is not None:
        note(Path(output), **{TRAINED_ON: "chats" if chats else "texts"})
    del params, adapted
    return _report("merged", _logits(*load(output)), expected)


def quantize_folder(
    model: str | Path,
    output: str | Path,
    scheme: str = "nf4",
    group_size: int = 64,
    double_quant: bool = True,
) -> float:
    """Writes a model's folder quantized, as bitsandbytes does it, and measures it.

    Args:
        model: a dense folder.
        output: a new or empty folder.
        scheme: nf4 | fp4 | int8 (which has one scale a column).
        group_size: weights that share a scale, of nf4 and fp4.
        double_quant: whether their scales are quantized too.

    Returns:
        The largest deviation of the logits, relative to the largest logit.
    """
    model = model_folder(model)
    group_size = -1 if scheme == "int8" else group_size
    module, params = load(model, quantize=scheme, group_size=group_size, double_quant=double_quant)
    save(module, params, output, like=model)
    print(f"wrote {output} in {scheme}")
    del params
    return _report("quantized", _logits(*load(output)), _logits(*load(model)))


def _trained_base(model: Path, adapter: Path) -> tuple[Transformer, PyTree]:
    """The base that the adapter was trained over: quantized as its card says, if the folder is dense."""
    tell_another_base(adapter, model)
    trained = read_quantization(adapter)
    module, params = load(model)
    if trained is None:
        return module, params
    if quantization_of(params) is None:
        settings = {key: trained[key] for key in ("scheme", "group_size", "double_quant")}
        params = quantize_params(params, **settings)
    found = quantization_of(params)
    if found != trained:
        raise UserError(
            f"{adapter}: was trained over another base: {_said(trained)}; {model} gives {_said(found)}"
        )
    return module, params


def _said(quantization: Any) -> str:
    scheme, group, digest = (quantization[key] for key in ("scheme", "group_size", "digest"))
    return f"{scheme} in groups of {group}, digest {digest}"


def _requantized(merged: PyTree, scheme: str) -> PyTree:
    return quantize_params(merged, scheme, group_size=-1 if scheme == "int8" else 64)


def _report(name: str, logits: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(logits - expected).max())
    relative = difference / float(np.abs(expected).max())
    against = "dense" if name == "quantized" else "adapted"
    print(
        f"largest deviation of {name} from {against} logits: {difference:.3g} "
        f"({relative:.3g} of the largest logit)"
    )
    return relative


def _logits(module: Transformer, params: PyTree) -> np.ndarray:
    """Logits (rows, length, vocabulary) of a few rows of random tokens, the same every time."""
    length = min(32, module.config.max_length)
    tokens = np.random.default_rng(0).integers(0, module.config.vocabulary, (4, length))
    apply: Any = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens))
    return np.asarray(apply(params, jnp.asarray(tokens, jnp.int32)))
