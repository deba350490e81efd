"""PEFT's adapter_config.json: what is read of it, what is refused, and which modules it means."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, named, nearest, shown
from jaxft.formats.manifest import check_manifest
from jaxft.runtime.sandbox import first_matches
from jaxft.runtime.sandbox.matching import match
from jaxft.runtime.untrusted import file_of, read_json

FILE = "adapter_config.json"
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
        "ensure_weight_tying": False,
        "trainable_token_indices": None,
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


# What an option may hold; `None` where PEFT writes null for "none".
MAX_RANK = 65_536
MAX_NAMES = 2000
MAX_TOKENS = 2**22  # more than any vocabulary has
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (f"a whole number from 1 to {MAX_RANK}", lambda value: _is_rank(value)),
    "lora_alpha": ("a number", lambda value: _is_number(value)),
    "lora_dropout": ("a rate of at least 0 and below 1", lambda value: _is_rate(value)),
    "vera_dropout": ("a rate of at least 0 and below 1", lambda value: _is_rate(value)),
    "projection_prng_key": (
        "a whole number of 32 bits",
        lambda value: type(value) is int and 0 <= value < 2**32,
    ),
    "rank_pattern": (
        "an object of names and ranks",
        lambda value: _is_object(value) and all(map(_is_rank, value.values())),
    ),
    "alpha_pattern": (
        "an object of names and numbers",
        lambda value: _is_object(value) and all(map(_is_number, value.values())),
    ),
    "target_modules": ("a list or a regular expression", lambda value: _are_names(value, str)),
    "exclude_modules": ("a list or a regular expression", lambda value: _are_names(value, str)),
    "modules_to_save": ("a list of names", lambda value: _are_names(value)),
    "layers_pattern": ("a name or a list of names", lambda value: _are_names(value, str)),
    "layers_to_transform": (
        "a number or a list of numbers",
        lambda value: value is None or type(value) is int or _is_list(value, int),
    ),
    "trainable_token_indices": (
        "a list of token ids, or an object of module names and such lists",
        lambda value: (
            value is None
            or _are_tokens(value)
            or (_is_object(value) and all(map(_are_tokens, value.values())))
        ),
    ),
    "base_model_name_or_path": ("text", lambda value: value is None or isinstance(value, str)),
    **{
        flag: ("true or false", lambda value: value is None or isinstance(value, bool))
        for flag in (
            "use_rslora",
            "use_dora",
            "fan_in_fan_out",
            "save_projection",
            "ensure_weight_tying",
        )
    },
}
# A pattern that reads as a name: it needs no guard against one that never ends.
PLAIN = re.compile(r"[\w.\\-]{0,300}|\[\^\.\]\*")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The options of a PEFT adapter, each with PEFT's default where it is left out.

    Raises:
        UserError: no such folder or file, an unknown kind of adapter, an unknown option, or a value
            that an option does not take.
    """
    check_manifest(folder)
    file = file_of(folder, FILE, f"an adapter is a folder with {FILE}")
    raw = read_json(file)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise UserError(
            f"{file}: peft_type {shown(kind)} is not known to jaxft, which reads {', '.join(READ)}"
        )
    known = COMMON | READ[kind]
    for option, value in raw.items():
        private = option.startswith("_")  # what a library notes for itself, as _from_model_config
        if value and not private and option not in known and option not in HARMLESS:
            raise UserError(
                f"{file}: {named(option)} = {shown(value)} changes the adapter in a way unknown "
                "to jaxft"
            )
    written = {option: raw[option] for option in known if option in raw}
    empty = [option for option in written if written[option] is None and known[option] == {}]
    options = known | {option: value for option, value in written.items() if option not in empty}
    _check_values(file, options)
    return options


def _check_values(file: Path, options: Mapping[str, Any]) -> None:
    biases = ("none", "all", f"{options['peft_type'].lower()}_only")
    if options["bias"] not in biases:
        raise UserError(f"{file}: bias takes {', '.join(biases)}, not {shown(options['bias'])}")
    for option, (takes, holds) in KINDS.items():
        if option in options and not holds(options[option]):
            raise UserError(f"{file}: {option} takes {takes}, not {shown(options[option])}")
    if options.get("init_lora_weights", True) not in INITIAL:
        raise UserError(
            f"{file}: init_lora_weights = {shown(options['init_lora_weights'])} changes the base "
            "too: save it with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    alphas = [options.get("lora_alpha", 1), *options.get("alpha_pattern", {}).values()]
    if options.get("use_dora") and 0 in alphas:
        raise UserError(f"{file}: a DoRA adapter with an alpha of 0 is not known to jaxft")


def _are_tokens(value: Any) -> bool:
    """A list of ids, each once."""
    return (
        isinstance(value, list)
        and all(type(token) is int and 0 <= token < MAX_TOKENS for token in value)
        and len(set(value)) == len(value)
    )


def _is_number(value: Any) -> bool:
    """A finite number of a size that float32 holds."""
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_NAMES


def _is_list(value: Any, kind: type) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_NAMES
        and all(type(item) is kind for item in value)
    )


def _are_names(value: Any, *also: type) -> bool:
    return value is None or isinstance(value, also) or _is_list(value, str)


def _first_matches(
    patterns: Sequence[str], modules: Sequence[str], form: str, whole: bool = False
) -> Sequence[Any]:
    """For each module (index, groups) of the first pattern that matches it, put in `form`, or None.

    A folder's own regular expressions are tried in the sandbox: one can take for ever.
    """
    try:
        if all(PLAIN.fullmatch(pattern) for pattern in patterns):
            return match(patterns, modules, form, whole)
        return first_matches(patterns, modules, form, whole)
    except (ValueError, UserError) as error:
        raise UserError(f"{FILE}: {shown(patterns[0])}: {error}") from error


def matches_list(targets: Iterable[str], module: str) -> bool:
    """PEFT's rule for a list of `target_modules`: endings, from a dot on."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _matching(targets: str | Sequence[str], modules: Sequence[str]) -> set[str]:
    """The modules that `target_modules` means: by a regular expression of the whole, or a list."""
    if isinstance(targets, str):
        found = _first_matches([targets], modules, "{}", whole=True)
        return {module for module, one in zip(modules, found, strict=True) if one}
    return {module for module in modules if matches_list(targets, module)}


def targeted(
    options: Mapping[str, Any], modules: Iterable[str], projections: Container[str]
) -> set[str]:
    """The modules that PEFT adapts; `projections` are what "all-linear" means."""
    targets, excluded = options["target_modules"], options["exclude_modules"]
    left = list(modules)
    if excluded:
        out = _matching(excluded, left)
        left = [module for module in left if module not in out]
    if saved := options["modules_to_save"]:
        found = _first_matches(saved, left, r"(?:^|.*\.){}(?:$|\..*)")
        left = [module for module, one in zip(left, found, strict=True) if not one]
    if targets == "all-linear":
        return {module for module in left if module in projections}
    meant = _matching(targets, left)
    if isinstance(targets, str):
        return meant
    return {module for module in meant if module in targets} | _in_layers(options, sorted(meant))


def _in_layers(options: Mapping[str, Any], modules: Sequence[str]) -> set[str]:
    """Those in one of the layers that `layers_to_transform` names; all where it names none."""
    chosen, patterns = options["layers_to_transform"], options["layers_pattern"] or [r"[^.]*"]
    if chosen is None or chosen == []:
        return set(modules)
    wanted = {chosen} if isinstance(chosen, int) else set(chosen)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    form = r"(?:^|.*?\.){}\.(\d+)\."
    found = _first_matches(patterns, modules, form)
    inside = set()
    for module, one in zip(modules, found, strict=True):
        number = str(one[1][0]) if one else ""
        if number.isdecimal() and int(number) in wanted:
            inside.add(module)
    return inside


def tokens_of(
    options: Mapping[str, Any], modules: Mapping[str, Any], embedding: str
) -> dict[str, list[int]]:
    """{module: the tokens whose rows `trainable_token_indices` trains there}; a list means the embedding.

    Raises UserError for a name that means none of the modules.
    """
    said = options.get("trainable_token_indices")
    said = {embedding: said} if isinstance(said, list) else said or {}
    found: dict[str, list[int]] = {}
    for name, tokens in said.items():
        meant = [module for module in modules if matches_list([name], module)]
        if not meant:
            raise UserError(
                f"{FILE}: trainable_token_indices: {shown(name)} is neither the embedding nor the head"
                f"{nearest(name, [module.split('.')[-1] for module in modules])}"
            )
        found |= {module: tokens for module in meant if tokens}
    return found


def is_saved(options: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` means this module, or one it is in: by the ending, in which PEFT asks for no dot."""
    parts = module.split(".")
    whole = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(name.endswith(x) for name in whole for x in options["modules_to_save"] or ())


def _pattern_values(pattern: Mapping[str, Any], modules: Sequence[str], default: Any) -> list[Any]:
    """Each module's value: of the first regular expression that fits its end, from a dot on."""
    values = list(pattern.values())
    if not values:
        return [default] * len(modules)
    found = _first_matches(list(pattern), modules, r"(?:.*\.)?(?:{})$")
    return [values[one[0]] if one else default for one in found]


def ranks_and_scales(
    options: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, tuple[int, float]]:
    """{module: (rank, s)}; s is its alpha over its rank, or over the rank's root with rsLoRA."""
    ranks = _pattern_values(options["rank_pattern"], modules, options["r"])
    alphas = _pattern_values(options["alpha_pattern"], modules, options["lora_alpha"])
    return {
        module: (rank, float(alpha / (rank**0.5 if options["use_rslora"] else rank)))
        for module, rank, alpha in zip(modules, ranks, alphas, strict=True)
    }


def unknown_target(targets: Iterable[str], modules: Iterable[str]) -> str | None:
    """The first of the targets that means no module, with the nearest names; None if all do."""
    modules = list(modules)
    for target in targets:
        if not any(matches_list([target], module) for module in modules):
            endings = dict.fromkeys(module.split(".")[-1] for module in modules)
            return f"{shown(target)}{nearest(target, endings)}"
    return None
