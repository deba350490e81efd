"""Examples to batches: files -> rows -> token ids and trained marks -> packed or padded batches."""

from __future__ import annotations

from jaxft.data.batches import Batches as Batches
from jaxft.data.chat import encode_chat as encode_chat
from jaxft.data.chat import encode_chat_with_mask as encode_chat_with_mask
from jaxft.data.examples import Summary as Summary
from jaxft.data.examples import prepare_examples as prepare_examples
from jaxft.data.packing import Batch as Batch
from jaxft.data.packing import length_buckets as length_buckets
from jaxft.data.packing import pack as pack
from jaxft.data.sources import FORMATS as FORMATS
from jaxft.data.sources import ROLES as ROLES
from jaxft.data.sources import Row as Row
from jaxft.data.sources import Rows as Rows
from jaxft.data.sources import read_rows as read_rows
from jaxft.data.store import Example as Example
from jaxft.data.store import Examples as Examples
from jaxft.data.tokenizer import Tokenizer as Tokenizer
from jaxft.data.tokenizer import load_tokenizer as load_tokenizer
