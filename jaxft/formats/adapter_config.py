"""PEFT's adapter_config.json: what is read of it, what is refused, and which modules it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.formats.safetensors import read_json

# The options that are read, with the values PEFT gives them where a file leaves them out.
READ: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    },
    "VERA": {"r": 256, "vera_dropout": 0.0, "projection_prng_key": 0, "save_projection": True},
}
COMMON: dict[str, Any] = {
    "peft_type": None,
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "base_model_name_or_path": None,
}
# What says where an adapter comes from or how it began, and nothing of what it computes.
HARMLESS = (
    "auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "d_initial",
    "init_weights", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    "loftq_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# Beginnings that leave the base as it is; the others (pissa, olora, corda ...) subtract from it.
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The options of a PEFT adapter, each with PEFT's default where it is left out.

    Raises:
        UserError: no such folder or file, an unknown kind of adapter, or an unknown option.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; an adapter is a folder with adapter_config.json"
        )
    file = folder / "adapter_config.json"
    if not file.exists():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "no files"
        raise UserError(f"{folder}: no adapter_config.json; there are: {there}")
    raw = read_json(file)
    kind = raw.get("peft_type")
    if kind not in READ:
        raise UserError(
            f"{file}: peft_type {kind!r} is not known to jaxft, which reads {', '.join(READ)}"
        )
    known = COMMON | READ[kind]
    for option, value in raw.items():
        if value and option not in known and option not in HARMLESS:
            raise UserError(
                f"{file}: {option} = {value!r} changes the adapter in a way unknown to jaxft"
            )
    options = known | {option: raw[option] for option in known if option in raw}
    _check_values(file, options)
    return options


def _check_values(file: Path, options: Mapping[str, Any]) -> None:
    if type(options["r"]) is not int or options["r"] < 1:
        raise UserError(f"{file}: r = {options['r']!r} is no rank")
    if not isinstance(options.get("lora_alpha", 1), int | float):
        raise UserError(f"{file}: lora_alpha = {options['lora_alpha']!r} is no number")
    if options.get("init_lora_weights", True) not in INITIAL:
        raise UserError(
            f"{file}: init_lora_weights = {options['init_lora_weights']!r} changes the base "
            "too: save it with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    for option in ("target_modules", "exclude_modules"):
        if not isinstance(options[option], str | list | None):
            raise UserError(f"{file}: {option} is neither a list nor a regular expression")


def matches_list(targets: str | Iterable[str], module: str) -> bool:
    """PEFT's rule for `target_modules`: a regular expression of the whole, or a list of endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def is_target(options: Mapping[str, Any], module: str, projection: bool) -> bool:
    """Whether PEFT adapts this module; a `projection` is what "all-linear" means."""
    targets, excluded = options["target_modules"], options["exclude_modules"]
    if excluded and matches_list(excluded, module):
        return False
    if any(
        re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in options["modules_to_save"] or ()
    ):
        return False
    if targets == "all-linear":
        return projection
    if isinstance(targets, str) or module in targets:
        return matches_list(targets, module)
    return matches_list(targets, module) and _in_layers(options, module)


def _in_layers(options: Mapping[str, Any], module: str) -> bool:
    chosen, patterns = options["layers_to_transform"], options["layers_pattern"] or r"[^.]*"
    if chosen is None or chosen == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False


def is_saved(options: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` means this module: by its ending, in which PEFT asks for no dot."""
    return any(module.endswith(ending) for ending in options["modules_to_save"] or ())


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first regular expression that fits the name's end, from a dot on."""
    return next(
        (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default
    )


def scale_of(options: Mapping[str, Any], module: str, rank: int) -> float:
    """s: the module's own alpha over its rank, or over the rank's root with rsLoRA."""
    alpha = pattern_value(options["alpha_pattern"], module, options["lora_alpha"])
    return float(alpha / (rank**0.5 if options["use_rslora"] else rank))


def unknown_target(targets: Iterable[str], modules: Iterable[str]) -> str | None:
    """The first of the targets that means no module, with the nearest names; None if all do."""
    modules = list(modules)
    for target in targets:
        if not any(matches_list([target], module) for module in modules):
            endings = dict.fromkeys(module.split(".")[-1] for module in modules)
            return f"{target!r}{nearest(target, endings)}"
    return None
