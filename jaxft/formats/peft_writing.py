"""PEFT adapters, written: what `PeftModel.from_pretrained` loads, with the same logits."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.adaptation import moved_base
from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats.adapter_config import is_saved, targeted
from jaxft.formats.manifest import BASE, fingerprint, write_manifest
from jaxft.formats.naming import conv1d, modules_in, names_in
from jaxft.formats.peft_saving import extras_in
from jaxft.formats.peft_tensors import (
    Adapted,
    adapter_weights,
    adapters_in,
    shared_in,
    tied_head_name,
    token_rows_in,
)
from jaxft.formats.safetensors import Lazy, write_file, write_json
from jaxft.methods import Method
from jaxft.models.families import Tensor
from jaxft.quantizing import quantization_of
from jaxft.runtime.hub import meant
from jaxft.runtime.storage import is_remote, local
from jaxft.tree import PyTree, flatten_with_paths, layer_starts
from jaxft.vocabulary import EMBEDDING
from jaxft.weights import bare, is_encoded, is_weight, saved_in

PREFIX = "base_model.model."
QUANTIZED_KEY = "jaxft_base_quantization"

# What becomes of an adapter's start, by whether it was taken off the base.
_STARTED = {
    False: "what is stored is an ordinary LoRA over the base named above",
    True: "the base named above lacks that start, and goes with this adapter alone",
}
CARD = """\
---
{base_line}{quantized_line}library_name: peft
pipeline_tag: text-generation
tags:
- {tag}
- jaxft
---

# {title} adapter

- base model: {base}
- method: {method}, rank {rank}
{quantized_item}{started_item}- trained with jaxft

In PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
{resized}model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

In jaxft:

```python
import jaxft

model, params = jaxft.load("{base}")
params = jaxft.load_adapter(params, "path/to/this/folder")
```
"""


def save_adapter(
    params: PyTree,
    folder: str | Path,
    *,
    method: Method | None = None,
    base: str | Path = "",
    names: Mapping[str, str] | None = None,
    trained: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the tree's adapters in PEFT's format, with a model card.

    Ranks are the true ones, without padding. The folder appears whole or not at all.

    Args:
        params: the adapted tree.
        folder: a new or empty folder.
        method: what adapted it: its name for the model card, its way to scale, its `train_also`.
        base: the base's folder or hub name.
        names: {path: module name with {layer}}; by default those of the family whose tree it is.
        trained: patterns of the dense leaves to write as `modules_to_save`; by default the method's
            `train_also`. What the tree remembers is written too: what the method trained beside its adapters,
            and what `load_adapter` read.
        overwrite: replace an adapter that stands there.

    Raises:
        UserError: no adapter, one that PEFT has no place for, or a folder that is not empty.
    """
    target = local(folder, "an adapter that is written")
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; jaxft overwrites nothing: name a new folder")
    if moved_base(params) and not str(base):
        raise UserError(
            "save_adapter: the adapter's start was taken off its base, which is no longer that of the folder it was "
            "read from: jaxft.save(model, jaxft.base_tree(params), FOLDER), and give base=FOLDER"
        )
    options, tensors = _export(params, method, names, trained)
    options |= _named_base(str(base))
    started = ""
    if method is not None and method.init != "default":
        started = f"- it began by {method.init}: {_STARTED[moved_base(params)]}\n"
    said = card(
        options, method.name if method else "", quantization_of(params), started, _resized(params)
    )
    unknown = not base or (is_remote(base) and not meant(base))
    digests = {} if unknown else fingerprint(model_folder(base, required=False), BASE)
    write_adapter(target, options, tensors, said, digests)


def write_adapter(
    target: Path,
    options: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    said: str,
    base: Mapping[str, str],
) -> None:
    """Writes an adapter's folder, which appears whole or not at all and takes the place of what stands there.

    Args:
        target: the folder.
        options: adapter_config.json.
        tensors: {name: tensor}.
        said: the model card.
        base: {file: digest} of the base, {} for one that is not known.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    part.chmod(0o777 & ~_umask())
    try:
        write_file(part / "adapter_model.safetensors", tensors)
        write_json(part / "adapter_config.json", options)
        (part / "README.md").write_text(said, encoding="utf-8")
        write_manifest(part, base=base)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _named_base(base: str) -> dict[str, str | None]:
    """The base as PEFT finds it again: a folder, or a name of the hub and the commit of it."""
    repository = meant(base)
    if repository is None or not (repository.revision or "://" in base):
        return {"base_model_name_or_path": base or None}
    return {
        "base_model_name_or_path": repository.name,
        "revision": repository.revision or None,
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_exportable(
    params: PyTree,
    method: Method,
    *,
    names: Mapping[str, str] | None = None,
    trained: Sequence[str] | None = None,
) -> None:
    """Raises the UserError that `save_adapter` would raise, before there is training to lose."""
    if method.weight is not None:
        _export(params, method, names, trained)


def _export(
    params: PyTree,
    method: Method | None,
    names: Mapping[str, str] | None,
    trained: Sequence[str] | None,
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """adapter_config.json, and {name: tensor}."""
    table = names_in(params, names) | tied_head_name(params)
    modules = modules_in(table, params)
    kind, adapted = adapters_in(params, table)
    patterns = trained if trained is not None else method.train_also if method else ()
    tokens = token_rows_in(params, table)
    extras = extras_in(params, table, adapted, tokens, patterns)
    peft_type = "VERA" if kind == "vera" else "LORA"
    saved = sorted({name.rsplit(".", 1)[0] for name in extras.whole})
    options: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": f"{peft_type.lower()}_only" if extras.bias == "only" else extras.bias,
        "fan_in_fan_out": conv1d(table),
        "layers_to_transform": None,
        "modules_to_save": _endings(saved, modules) or None,
    }
    options |= _target_options(options, adapted, modules, layer_starts(params, is_weight))
    dropout = max(getattr(weight, "dropout", 0.0) for _, weight in adapter_weights(params))
    if kind == "vera":
        options |= {
            "r": next(iter(adapted.values())).rank,
            "vera_dropout": dropout,
            "save_projection": True,
        }
        options |= {"projection_prng_key": saved_in(params).projection_seed, "d_initial": 0.1}
    else:
        options |= {"lora_dropout": dropout, "use_dora": kind == "dora", "init_lora_weights": True}
        options |= _rank_options(adapted, method is not None and method.rank_stabilized)
    tensors = {
        f"{PREFIX}{module}.{ending}": tensor
        for module, one in (*adapted.items(), *tokens.items())
        for ending, tensor in one.parts.items()
    }
    if tokens:
        options["trainable_token_indices"] = _token_options(tokens, table)
    tensors |= {PREFIX + name: tensor for name, tensor in extras.tensors.items()}
    return options, tensors | (shared_in(params) if kind == "vera" else {})


def _token_options(tokens: Mapping[str, Adapted], table: Mapping[str, Tensor]) -> Any:
    """PEFT's `trainable_token_indices`: a list where it is the embedding alone, which it then finds by itself."""
    if set(tokens) == {table[EMBEDDING].module}:
        return list(tokens[table[EMBEDDING].module].tokens)
    return {module.split(".")[-1]: list(one.tokens) for module, one in tokens.items()}


def _target_options(
    options: Mapping[str, Any],
    adapted: Mapping[str, Any],
    modules: Mapping[str, Any],
    starts: Mapping[str, int],
) -> dict[str, Any]:
    """The shortest targets and `layers_to_transform` that mean the adapted modules alone."""
    places = [modules[name] for name in adapted]
    layers = sorted(
        {starts.get(path.split("/")[0], 0) + at for path, at in places if at is not None}
    )
    common = {
        "exclude_modules": None,
        "layers_pattern": None,
        "modules_to_save": options["modules_to_save"],
    }
    for length in (1, 2):
        targets = sorted({".".join(name.split(".")[-length:]) for name in adapted})
        for chosen in (None, layers):
            means = common | {"target_modules": targets, "layers_to_transform": chosen}
            if targeted(means, modules, ()) == adapted.keys():
                return {"target_modules": targets, "layers_to_transform": chosen}
    return {"target_modules": sorted(adapted)}


def _endings(wanted: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """`modules_to_save`: the last names where they mean these modules alone, else whole names."""
    short = sorted({name.split(".")[-1] for name in wanted})
    meant = {name for name in modules if is_saved({"modules_to_save": short}, name)}
    return short if meant == set(wanted) else list(wanted)


def _rank_options(adapted: Mapping[str, Adapted], stabilized: bool) -> dict[str, Any]:
    """r and lora_alpha, the most common ones, and patterns for the rest."""
    plain = {name: _alpha(one.scale, float(one.rank)) for name, one in adapted.items()}
    rooted = {name: _alpha(one.scale, one.rank**0.5) for name, one in adapted.items()}
    even = [sum(isinstance(alpha, int) for alpha in alphas.values()) for alphas in (plain, rooted)]
    use_rslora = even[1] > even[0] or (stabilized and even[1] == even[0])
    alphas = rooted if use_rslora else plain
    ranks = {name: one.rank for name, one in adapted.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): x for name, x in alphas.items() if x != alpha},
    }


def _alpha(scale: float, divisor: float) -> float:
    """The alpha with `alpha / divisor == scale` in float32, a short number if possible."""
    exact = scale * divisor
    for candidate in (round(exact), float(f"{exact:.6g}")):
        if np.float32(candidate / divisor) == np.float32(scale):
            return candidate
    return exact


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """What the base was quantized to when the adapter in this folder was trained, as its card says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(rf"^{QUANTIZED_KEY}: (\{{.*\}})$", text, re.MULTILINE)
    return json.loads(found[1]) if found else None


def _resized(params: PyTree) -> str:
    """The card's line by which the base gets rows for all tokens that the adapter has."""
    embedding = bare(dict(flatten_with_paths(params, is_leaf=is_weight)).get(EMBEDDING))
    if not is_weight(embedding) or is_encoded(embedding):
        return ""
    return f"base.resize_token_embeddings({embedding.shape[0]})  # there are new tokens\n"


def card(
    options: Mapping[str, Any],
    made_by: str,
    quantized: Mapping[str, Any] | None,
    started: str = "",
    resized: str = "",
) -> str:
    """The model card of an adapter.

    Args:
        options: adapter_config.json.
        made_by: the method, or what else made it; "": what PEFT calls its kind.
        quantized: what the base was quantized to, if it was.
        started: a line about its start, or "".
        resized: a line by which the base gets rows for new tokens, or "".
    """
    line = item = ""
    if quantized:
        scales = ", scales quantized too" if quantized["double_quant"] else ""
        line = f"{QUANTIZED_KEY}: {json.dumps(quantized)}\n"
        item = f"- the base was quantized: {quantized['scheme']}, groups of {quantized['group_size']}{scales}\n"
    kind = (
        "DoRA"
        if options.get("use_dora")
        else {"LORA": "LoRA", "VERA": "VeRA"}[options["peft_type"]]
    )
    base = options["base_model_name_or_path"]
    return CARD.format(
        base_line=f"base_model: {base}\n" if base else "",
        quantized_line=line,
        quantized_item=item,
        started_item=started,
        tag=options["peft_type"].lower(),
        title=kind,
        base=base or "path/to/the/base",
        resized=resized,
        method=made_by or kind,
        rank=options["r"],
    )
