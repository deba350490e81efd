"""`jaxft merge`: a base and its adapter written as one Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.assets import model_folder
from jaxft.formats.huggingface import load, write_model
from jaxft.formats.manifest import tell_another_base
from jaxft.formats.peft import load_adapter
from jaxft.formats.safetensors import open_folder
from jaxft.models.transformer import Transformer
from jaxft.tree import PyTree

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}


def merge_folder(model: str | Path, adapter: str | Path, output: str | Path) -> float:
    """Writes base and adapter as one folder, in the base's dtype and layout, and measures it.

    The merged folder is read back and its logits are compared, in float32, with those of base and
    adapter: the rounding to the stored dtype is part of the deviation.

    Args:
        model: the base's folder.
        adapter: a PEFT folder.
        output: a new or empty folder.

    Returns:
        The largest deviation of the logits, relative to the largest logit.
    """
    model = model_folder(model)
    tell_another_base(Path(adapter), model)
    module, params = load(model)
    adapted = load_adapter(params, adapter)
    expected = _logits(module, adapted)
    dtypes = {NAMES.get(tensor.dtype, "float32") for tensor in open_folder(model).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    write_model(module.config, adapted, output, like=model, dtype=dtype)
    del params, adapted
    difference = float(np.abs(_logits(*load(output)) - expected).max())
    relative = difference / float(np.abs(expected).max())
    print(f"wrote {output} in {dtype}")
    print(
        f"largest deviation of merged from adapted logits: {difference:.3g} "
        f"({relative:.3g} of the largest logit)"
    )
    return relative


def _logits(module: Transformer, params: PyTree) -> np.ndarray:
    """Logits (rows, length, vocabulary) of a few rows of random tokens, the same every time."""
    length = min(32, module.config.max_length)
    tokens = np.random.default_rng(0).integers(0, module.config.vocabulary, (4, length))
    apply: Any = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens))
    return np.asarray(apply(params, jnp.asarray(tokens, jnp.int32)))
