"""What a run needs, told by the compiler before anything is spent."""

from __future__ import annotations

from jaxft.planning.plan import Plan, find_batch, plan, variants

__all__ = ["Plan", "find_batch", "plan", "variants"]
