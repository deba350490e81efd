"""The names of gemma 4's tensors."""

from __future__ import annotations

import itertools

from jaxft.models.config import Config
from jaxft.models.families.common import FOUR_NORMS, LAYER, tensors_by_name
from jaxft.models.families.family import Tensor


def tensors(config: Config) -> dict[str, Tensor]:
    found = tensors_by_name(config, FOUR_NORMS)
    found["layers/scalar/scale"] = Tensor(f"{LAYER}.layer_scalar")
    if not config.layer_inputs:
        return found
    kernels = {
        "layer_inputs/model_proj": "model.per_layer_model_projection",
        "layers/inputs/gate_proj": f"{LAYER}.per_layer_input_gate",
        "layers/inputs/output_proj": f"{LAYER}.per_layer_projection",
    }
    found |= {f"{path}/kernel": Tensor(f"{name}.weight", True) for path, name in kernels.items()}
    return found | {
        "layer_embed/embedding": Tensor("model.embed_tokens_per_layer.weight"),
        "layer_inputs/norm/scale": Tensor("model.per_layer_projection_norm.weight"),
        "layers/post_inputs_norm/scale": Tensor(f"{LAYER}.post_per_layer_input_norm.weight"),
    }


def spare(config: Config) -> list[str]:
    """Modules of layers that read another's keys, where folders keep keys and values all the same."""
    borrowed = _borrowing(config)
    names = ("k_proj", "v_proj", "k_norm", "v_norm")
    pairs = itertools.product(borrowed, names)
    return [f"{LAYER.format(layer=layer)}.self_attn.{name}" for layer, name in pairs]


def _borrowing(config: Config) -> list[int]:
    """The numbers of the layers that read another's keys and values."""
    numbers = itertools.chain.from_iterable(
        [dict(changes).get("keys_from", -1) >= 0] * count for count, changes in config.parts
    )
    return [layer for layer, borrows in enumerate(numbers) if borrows]
