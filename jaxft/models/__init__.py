"""One decoder, configured, and the families that it can be."""

from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, Tensor, family_of, module_names, tensors_of
from jaxft.models.transformer import Transformer, head_of, hidden_states, logits

__all__ = [
    "FAMILIES",
    "Config",
    "Tensor",
    "Transformer",
    "family_of",
    "head_of",
    "hidden_states",
    "logits",
    "module_names",
    "tensors_of",
]
