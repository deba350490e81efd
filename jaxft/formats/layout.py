"""How a quantized folder's kernels will lie in memory, by what its config.json says: no kernel is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.defaults import GROUP_SIZE
from jaxft.errors import UserError
from jaxft.formats.gptq import modules_quantized
from jaxft.formats.huggingface import names_of
from jaxft.models import Config
from jaxft.models.families import tensors_of
from jaxft.runtime.sandbox import first_matches
from jaxft.tree import PyTree, map_with_paths, matches
from jaxft.weights import Permuted, Weight, quantize

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a kernel is read as.

    Attributes:
        scheme, group_size, double_quant, symmetric: as of `jaxft.quantize`.
        scattered: whether the rows of a group are, so that their order is held.
    """

    scheme: str
    group_size: int = GROUP_SIZE
    double_quant: bool = False
    symmetric: bool = True
    scattered: bool = False

    def of(self, kernel: jax.Array) -> Weight:
        """A weight of this layout (its numbers mean nothing) in place of a kernel (layers, in, out)."""
        weight = quantize(
            kernel,
            self.scheme,
            group_size=self.group_size,
            double_quant=self.double_quant,
            symmetric=self.symmetric,
        )
        if self.scattered and self.group_size not in (-1, kernel.shape[-2]):
            return Permuted(weight, jnp.zeros(kernel.shape[:-1], jnp.int32))
        return weight


Rules = list[tuple[str, Layout | None]]


def laid_out_as_stored(params: PyTree, config: Config, settings: Settings, where: str) -> PyTree:
    """A fresh dense tree with its projections as `load` reads them from a folder that is quantized already.

    Args:
        params: of `initial_params`; traced, for nothing of it is worth computing.
        config: the model's.
        settings: what config.json says of quantization; for bitsandbytes' 4 bits "blocksize" too, which it does not.
        where: the file, for messages.

    Raises:
        UserError: a variant that is not read, layers of one leaf that are quantized in different ways.
    """
    rules = RULES[settings["quant_method"]](settings)
    tensors = tensors_of(config)
    modules = {
        path: [name.removesuffix(".weight") for name in names_of(tensors[path], config, path)]
        for path in tensors
        if matches("*_proj/kernel", path)
    }
    names = [name for each in modules.values() for name in each]
    found = first_matches([pattern for pattern, _ in rules], names)
    chosen = {
        name: rules[one[0]][1] if one else None for name, one in zip(names, found, strict=True)
    }

    def one(path: str, leaf: Any) -> Any:
        layouts = {chosen[name] for name in modules.get(path, [])}
        if None in layouts:  # where only some layers are quantized, all are held dense
            return leaf
        if len(layouts) > 1:
            raise UserError(
                f"{where}: the layers of {path} are quantized in different ways: jaxft stacks like with like"
            )
        layout = layouts.pop() if layouts else None
        return leaf if layout is None else layout.of(leaf)

    return map_with_paths(one, params)


def _named(name: str) -> str:
    """The expression for a module by its name, the end of it, or the name of a module around it."""
    return rf"(.*\.)?{re.escape(name)}(\..*)?$"


def _left_out(names: Any) -> Rules:
    return [(_named(str(name)), None) for name in names or ()]


def _bitsandbytes(settings: Settings) -> Rules:
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        layout = Layout("int8", group_size=-1)
    else:
        double = bool(settings.get("bnb_4bit_use_double_quant", False))
        layout = Layout(settings.get("bnb_4bit_quant_type", "fp4"), settings["blocksize"], double)
    # as transformers leaves modules out: by the beginning of their name up to a dot, or by its end
    skipped = [str(name) for name in settings.get("llm_int8_skip_modules") or ()]
    beginnings: Rules = [(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", None) for name in skipped]
    ends: Rules = [(rf".*{re.escape(name)}$", None) for name in skipped]
    return [*beginnings, *ends, (".*", layout)]


def _gptq(settings: Settings) -> Rules:
    def layout(settings: Settings) -> Layout:
        return Layout(
            f"int{settings['bits']}",
            settings.get("group_size", -1),
            symmetric=bool(settings.get("sym", True)),
            scattered=bool(settings.get("desc_act", False)),
        )

    own: Rules = [
        (pattern[2:] if pattern[1:2] == ":" else pattern,
         None if pattern.startswith("-:") else layout({**settings, **changed}))
        for pattern, changed in (settings.get("dynamic") or {}).items()
    ]  # fmt: skip
    inside = modules_quantized(settings)
    rest = [".*"] if inside is None else [_named(name) for name in inside]
    return [*own, *((pattern, layout(settings)) for pattern in rest)]


def _awq(settings: Settings) -> Rules:
    size = settings.get("group_size", settings.get("q_group_size", 128))
    layout = Layout("int4", size, symmetric=False)
    return [*_left_out(settings.get("modules_to_not_convert")), (".*", layout)]


def _compressed(settings: Settings) -> Rules:
    def pattern(target: str) -> str:
        if target == "Linear":
            return ".*"
        return target[3:] if target.startswith("re:") else _named(target)

    rules: Rules = [(pattern(name), None) for name in settings.get("ignore") or ()]
    for group in settings["config_groups"].values():
        weights = group.get("weights") or {}
        layout = Layout(
            f"int{weights.get('num_bits', 8)}",
            weights.get("group_size") or -1,
            symmetric=bool(weights.get("symmetric", True)),
            scattered=weights.get("actorder") in ("group", "dynamic", True),
        )
        rules += [(pattern(target), layout) for target in group.get("targets") or ["Linear"]]
    return rules


RULES = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
