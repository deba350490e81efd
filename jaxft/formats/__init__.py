"""Hugging Face folders and PEFT adapters: reading and writing, nothing in between."""

from jaxft.formats.banks import put_adapter, stack_adapters
from jaxft.formats.huggingface import load
from jaxft.formats.low_rank_starts import load_adapted
from jaxft.formats.peft import load_adapter, saved_leaves
from jaxft.formats.peft_writing import check_exportable, save_adapter
from jaxft.formats.writing import save

__all__ = [
    "check_exportable",
    "load",
    "load_adapted",
    "load_adapter",
    "put_adapter",
    "save",
    "save_adapter",
    "saved_leaves",
    "stack_adapters",
]
