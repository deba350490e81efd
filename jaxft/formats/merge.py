"""`jaxft merge` and `jaxft quantize`: a folder made of another, and what that changes of what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.adaptation import merge
from jaxft.assets import model_folder
from jaxft.defaults import DOUBLE_QUANT, GROUP_SIZE
from jaxft.errors import UserError, nearest
from jaxft.formats.companions import check_tokens
from jaxft.formats.huggingface import load
from jaxft.formats.manifest import TRAINED_ON, note, tell_another_base
from jaxft.formats.measure import measure, report
from jaxft.formats.own_text import text_for
from jaxft.formats.peft import load_adapter
from jaxft.formats.safetensors import open_folder
from jaxft.formats.trained_base import load_trained_base, trained_on_chats
from jaxft.formats.writing import save, write_model
from jaxft.models.transformer import Transformer, fitted
from jaxft.quantizing import quantize_params
from jaxft.runtime.storage import fetched
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights import is_weight, merged_one

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
DTYPES = ("float32", "bfloat16", "float16")


def merge_folder(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    quantize: str = "none",
    dtype: str = "",
) -> float:
    """Writes base and adapter as one folder, in the base's dtype and layout, and measures it.

    The merged folder is read back and compared, in float32, with base and adapter on the run's own text: the rounding
    to the stored dtype is part of what changes. An adapter that was trained over a quantized base is merged into that
    base's dequantized values. What stands beside the adapter (tokenizer, chat template, generation settings) comes
    along, before what stands beside the base.

    Args:
        model: the base's folder; the dense one of a quantized base will do.
        adapter: a PEFT folder.
        output: a new or empty folder.
        quantize: none, or the scheme to write the merged projections in: nf4 | fp4 | int8.
        dtype: what to store: float32 | bfloat16 | float16; "": the base's.

    Returns:
        The largest deviation of the logits on the text's beginning, relative to the largest logit.

    Raises:
        UserError: the adapter was trained over another quantized base, its tokenizer has tokens that the base lacks,
            or float16 cannot hold a weight.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(
            f"dtype {dtype!r} is not one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    model, named = model_folder(model), adapter
    adapter = fetched(adapter)
    tell_another_base(adapter, model)
    module, params, _ = load_trained_base(model, adapter)
    adapted = load_adapter(params, adapter)
    module = Transformer(fitted(module.config, adapted))
    check_tokens(model, adapter, module.config.vocabulary)
    text = text_for(model, module.config, named)
    before = measure(module, adapted, text)
    if quantize == "none":
        dtype = dtype or _stored_dtype(model)
        if dtype == "float16":
            _check_range(adapted)
        write_model(
            module.config, adapted, output, like=model, beside=adapter, dtype=dtype, dense=True
        )
        print(f"wrote {output} in {dtype}")
    else:
        merged = merge(adapted)
        report("merged, not yet quantized", measure(module, merged, text), before, text, "float32")
        if dtype:
            merged = jax.tree.map(lambda leaf: _cast(leaf, dtype), merged)
        save(module, _requantized(merged, quantize), output, like=model, beside=adapter)
        print(f"wrote {output} in {quantize}")
    if (chats := trained_on_chats(fetched(adapter))) is not None:
        note(Path(output), **{TRAINED_ON: "chats" if chats else "texts"})
    del params, adapted
    stored = dtype if quantize == "none" else quantize
    return report("merged", measure(*load(output), text), before, text, stored)


def quantize_folder(
    model: str | Path,
    output: str | Path,
    scheme: str = "nf4",
    group_size: int = GROUP_SIZE,
    double_quant: bool = DOUBLE_QUANT,
) -> float:
    """Writes a model's folder quantized, as bitsandbytes does it, and measures it.

    Args:
        model: a dense folder.
        output: a new or empty folder.
        scheme: nf4 | fp4 | int8 (which has one scale a column).
        group_size: weights that share a scale, of nf4 and fp4.
        double_quant: whether their scales are quantized too.

    Returns:
        The largest deviation of the logits on the text's beginning, relative to the largest logit.
    """
    model = model_folder(model)
    group_size = -1 if scheme == "int8" else group_size
    module, params = load(model, quantize=scheme, group_size=group_size, double_quant=double_quant)
    save(module, params, output, like=model)
    print(f"wrote {output} in {scheme}")
    del params
    text = text_for(model, module.config, model)
    after, before = (measure(*load(folder), text) for folder in (output, model))
    return report("quantized", after, before, text, scheme)


def _requantized(merged: PyTree, scheme: str) -> PyTree:
    return quantize_params(merged, scheme, group_size=-1 if scheme == "int8" else 64)


def _stored_dtype(model: Path) -> str:
    """What the folder's floating tensors are stored in; float32 where they differ."""
    dtypes = {NAMES[t.dtype] for t in open_folder(model).values() if t.dtype in NAMES}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _cast(leaf: Any, dtype: str) -> Any:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _check_range(params: PyTree) -> None:
    """UserError where float16, whose largest number is 65504, cannot hold a merged weight."""
    most = float(jnp.finfo(jnp.float16).max)
    for path, leaf in flatten_with_paths(params, is_leaf=is_weight):
        dense = merged_one(leaf, params)
        largest = float(jnp.abs(dense).max())
        if largest > most:
            raise UserError(
                f"--dtype float16: {path} holds {largest:.3g}, and float16 nothing above {most:.0f}: take bfloat16"
            )
