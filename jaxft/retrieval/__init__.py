"""Retrieval: documents to chunks to an index, and its passages put before a question."""

from jaxft.retrieval.building import update_index
from jaxft.retrieval.calibrate import calibrate
from jaxft.retrieval.index import Index, Passage, Settings, open_index
from jaxft.retrieval.prompts import Retriever, open_retriever

__all__ = [
    "Index",
    "Passage",
    "Retriever",
    "Settings",
    "calibrate",
    "open_index",
    "open_retriever",
    "update_index",
]
