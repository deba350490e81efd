"""What a kernel leaf can be, one file a weight, and the rule that multiplies, merges and describes them."""

from jaxft.weights.alike import common_tree, cropped, padded
from jaxft.weights.bank import SLOTS, Bank, Slots, bind_groups, slots_of
from jaxft.weights.base import (
    Adapter,
    Peft,
    Weight,
    bare,
    base_of,
    bind,
    contract,
    contract_each,
    contract_transposed,
    count_parameters,
    is_adapter,
    is_encoded,
    is_weight,
    map_weights,
    materialize,
    merged_one,
    replace,
    static,
    take,
    weight,
    weights_of,
)
from jaxft.weights.delta_lora import DeltaLoRA
from jaxft.weights.dora import DoRA
from jaxft.weights.lora import EMBEDDING_PARTS, LINEAR_PARTS, LoRA, precondition_by_a
from jaxft.weights.low_rank_starts import (
    STARTS,
    LowRankStart,
    alternate,
    require_rank,
    stacked_start,
    start_of_dense,
)
from jaxft.weights.quantized.encode import quantize
from jaxft.weights.quantized.permuted import Permuted
from jaxft.weights.quantized.weight import SCHEMES, Flattened, Quantized, quantized_in
from jaxft.weights.saved import SHARED, Saved, of_the_model, places, remember, saved_in
from jaxft.weights.site import Site, key_of
from jaxft.weights.stacking import stacked, written
from jaxft.weights.tied import Tied, Transposed, is_tied_head
from jaxft.weights.tokens import TOKENS_PART, TokenRows, token_rows, widened
from jaxft.weights.vera import VeRA, drawn_projections, projections

__all__ = [
    "EMBEDDING_PARTS",
    "LINEAR_PARTS",
    "SCHEMES",
    "SHARED",
    "SLOTS",
    "STARTS",
    "TOKENS_PART",
    "Adapter",
    "Bank",
    "DeltaLoRA",
    "DoRA",
    "Flattened",
    "LoRA",
    "LowRankStart",
    "Peft",
    "Permuted",
    "Quantized",
    "Saved",
    "Site",
    "Slots",
    "Tied",
    "TokenRows",
    "Transposed",
    "VeRA",
    "Weight",
    "alternate",
    "bare",
    "base_of",
    "bind",
    "bind_groups",
    "common_tree",
    "contract",
    "contract_each",
    "contract_transposed",
    "count_parameters",
    "cropped",
    "drawn_projections",
    "is_adapter",
    "is_encoded",
    "is_tied_head",
    "is_weight",
    "key_of",
    "map_weights",
    "materialize",
    "merged_one",
    "of_the_model",
    "padded",
    "places",
    "precondition_by_a",
    "projections",
    "quantize",
    "quantized_in",
    "remember",
    "replace",
    "require_rank",
    "saved_in",
    "slots_of",
    "stacked",
    "stacked_start",
    "start_of_dense",
    "static",
    "take",
    "token_rows",
    "weight",
    "weights_of",
    "widened",
    "written",
]
