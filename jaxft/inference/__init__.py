"""What a model says: decoding with a cache, the choice of each token, and texts from prompts."""

from __future__ import annotations

# From here on `jaxft.inference.generate` is the function; its module has `main`, the command.
from jaxft.inference.generate import generate as generate

# So is `rollout`.
from jaxft.inference.rollout import rollout as rollout
