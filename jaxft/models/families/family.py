"""What a family is: how its config.json and its tensors on disk stand to a `Config` and its tree."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.models.config import Config


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a leaf stands on disk.

    Attributes:
        name: the tensor's name, with {layer} for a leaf that is stacked in the tree, and {expert} for one that has an
            axis of experts behind that of the layers: a tensor each.
        transposed: it is stored (out, in), as PyTorch's linear layers are.
    """

    name: str
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module that holds it: the name without `.weight` or `.bias`."""
        return self.name.rsplit(".", 1)[0]

    @property
    def stacked(self) -> bool:
        """Whether the leaf has an axis of layers."""
        return "{layer}" in self.name

    @property
    def each_expert(self) -> bool:
        """Whether the leaf has an axis of experts behind that of the layers."""
        return "{expert}" in self.name

    def names(self, start: int, shape: tuple[int, ...]) -> list[str]:
        """The names of a leaf's tensors: layer by layer, and in each expert by expert.

        Args:
            start: the number of the first layer in the leaf.
            shape: the leaf's, of which the axes of layers and experts count.

        >>> Tensor("h.{layer}.w").names(2, (2, 8, 8))
        ['h.2.w', 'h.3.w']
        """
        layers = range(start, start + shape[0]) if self.stacked else range(1)
        experts = range(shape[1]) if self.each_expert else range(1)
        return [
            self.name.format(layer=layer, expert=expert)
            for layer, expert in itertools.product(layers, experts)
        ]


def _nothing(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    return {}


def _none(config: Config) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture on disk.

    Attributes:
        architecture: its class name in config.json.
        read: config.json -> Config.
        write: Config -> what config.json says of this family; what all say is added.
        tensors: Config -> {path in a segment or the tree: Tensor}; paths below `layers/` are those of every segment.
            The prefix is that of the model with its head.
        prefix: what files saved from the model without its head leave out.
        ignored: endings of tensors that hold no weight (buffers that old files carry).
        spare: Config -> modules whose tensors folders may hold, and the model does not use: they are kept.
        needed: (config.json, Config) -> what transformers asks for that this config.json lacks.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], Config]
    write: Callable[[Config], dict[str, Any]]
    tensors: Callable[[Config], dict[str, Tensor]]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    spare: Callable[[Config], list[str]] = _none
    needed: Callable[[Mapping[str, Any], Config], dict[str, Any]] = _nothing
