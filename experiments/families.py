"""Every family against transformers and PEFT: folders and adapters, there and back.

    python experiments/families.py [CASE ...]

needs the extra `reference`. The cases are the tiny random models of tests/golden/families.json, on rows that are
longer than their windows and original rotary lengths. Each is read by jaxft and by transformers, and what follows is
the largest deviation of the logits, relative to the largest one:

    logits    whole, padded on the left, and packed
    cached    half of them, and then three tokens at a time
    folder    a folder that jaxft writes from the shape alone, loaded by transformers; it must be 0
    adapter   an adapter that PEFT made of all linear layers, read by jaxft
    trained   the same adapter after three updates by jaxft, written, and loaded by PEFT

The table is written to families.md beside this file, and the figures to families.json; with CASE its rows alone are
made anew.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load, load_adapter, save, save_adapter
from jaxft.models import logits
from jaxft.models.transformer import cached_hidden_states, empty_cache

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden"
TOLERANCE = 1e-4
RANK, UPDATES, RATE = 3, 3, 1e-2
COLUMNS = ("logits", "cached", "folder", "adapter", "trained")
# The linear layers of the text model, where a folder holds others too (PEFT's "all-linear" means them as well).
# What a family's folders may have that is refused, in one line that says so.
NOT_SERVED = {
    "all": "experts, latent or linear attention, encoders, attention to what follows; code of a folder's own",
    "any with a `text_config`": "vision and sound: the text is served, other parts stay as they are in what is saved",
    "gemma4_text": "the sizes with experts (26B-A4B); tokens that are added where the layers have inputs of their own",
    "gpt2": "scale_attn_by_inverse_layer_idx, reorder_and_upcast_attn, add_cross_attention",
}
TEXT = r".*language_model.*\.(?:[qkvo]|gate|up|down)_proj"


def relative(found: Any, expected: Any, seen: Any = None) -> float:
    """The largest difference, where `seen` is positive, relative to the largest expected number."""
    found, expected = np.asarray(found), np.asarray(expected)
    seen = np.ones(expected.shape[:2]) if seen is None else np.asarray(seen)
    return float(np.abs(found - expected)[seen > 0].max() / np.abs(expected[seen > 0]).max())


def model_of(folder: Path) -> Any:
    """transformers' model of a folder in float32; an error if a tensor is missing or too many."""
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, raw["architectures"][0])
    model, problems = kind.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    if any(problems.values()):
        raise AssertionError(f"{folder}: {problems}")
    return model.eval()


def asked(model: Any, **inputs: np.ndarray) -> np.ndarray:
    """transformers' logits; sequences that are packed are told apart by their position ids."""
    import torch

    given = {name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in inputs.items()}
    with torch.no_grad():
        return model(**given, use_cache=False).logits.numpy()


def cached(model: Any, params: Any, batch: dict[str, np.ndarray]) -> jax.Array:
    """jaxft's logits of the two padded rows: half of them, and then three tokens at a time."""
    config, length = model.config, batch["tokens"].shape[1]

    @jax.jit
    def advance(part: Any, cache: Any, index: jax.Array) -> Any:
        hidden, cache = cached_hidden_states(config, params, *part, cache, index)
        return logits(config, params, hidden), cache

    inputs = [jnp.asarray(batch[name][1:3]) for name in ("tokens", "segments", "positions")]
    cache, found = empty_cache(config, 2, length), []
    for start, end in itertools.pairwise((0, *range(length // 2, length + 1, 3))):
        part = [array[:, start:end] for array in inputs]
        scores, cache = advance(part, cache, jnp.asarray(start, jnp.int32))
        found.append(scores)
    return jnp.concatenate(found, axis=1)


def adapter_of_peft(model: Any, raw: dict[str, Any], folder: Path) -> Any:
    """Puts a LoRA of all linear layers on transformers' model, every tensor of it random, and saves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = TEXT if "text_config" in raw else "all-linear"
    settings = LoraConfig(r=RANK, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
    adapted.save_pretrained(folder)
    return adapted


def trained(model: Any, params: Any, tokens: np.ndarray) -> Any:
    """The tree after some updates of its adapter by AdamW on next tokens."""
    trainable, frozen = jaxft.partition(params, jaxft.methods.lora(rank=RANK))
    optimizer = optax.adamw(RATE)

    @jax.jit
    def update(trainable: Any, state: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            scores = model.apply({"params": jaxft.combine(trainable, frozen)}, tokens[:, :-1])
            rows = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
            return rows.mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        change, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, change), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(UPDATES):
        trainable, state, value = update(trainable, state)
        losses.append(float(value))
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")
    return jaxft.combine(trainable, frozen)


def measure(name: str, case: dict[str, Any], golden: Any, folder: Path) -> dict[str, float]:
    """The five deviations of a case."""
    from peft import PeftModel

    with np.load(golden.LOGITS) as file:
        tokens, expected = file["tokens"], file[name]
    source, batch = golden.write_folder(case, folder / "source"), golden.rows(tokens)
    model, params = load(source)
    inputs = [jnp.asarray(batch[part]) for part in ("tokens", "segments", "positions")]
    run = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    reference = asked(model_of(source), input_ids=tokens)
    if not np.allclose(reference, expected, atol=3e-5 * np.abs(expected).max()):
        raise AssertionError(f"{name}: families.npz holds other logits than transformers gives")
    found = {"logits": golden.deviation(run(params, *inputs), reference, batch)}
    wanted = reference[batch["of"][..., 0], batch["of"][..., 1]][1:3]
    found["cached"] = relative(cached(model, params, batch), wanted, batch["segments"][1:3])
    save(model, params, folder / "own")
    found["folder"] = relative(asked(model_of(folder / "own"), input_ids=tokens), reference)
    adapted = adapter_of_peft(model_of(source), case["config"], folder / "adapter")
    params = load_adapter(params, folder / "adapter")
    found["adapter"] = relative(run(params, *inputs)[:2], asked(adapted, input_ids=tokens))
    params = trained(model, params, tokens)
    save_adapter(params, folder / "trained")
    read = PeftModel.from_pretrained(model_of(source), str(folder / "trained")).eval()
    after = asked(read, input_ids=tokens)
    found["trained"] = relative(run(params, *inputs)[:2], after)
    if relative(after, asked(adapted, input_ids=tokens)) < 10 * TOLERANCE:
        raise AssertionError(f"{name}: training changed nothing")
    return found


def table(results: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    """families.md: a row a case."""
    lines = [
        "# The families",
        "",
        "Made by `experiments/families.py`, which says what the columns are, with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ": the largest deviation of the logits, relative to the largest one, in float32 on the CPU.",
        "",
        f"| case | family | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
    ]
    for name, row in results.items():
        figures = (f"{row[column]:.0e}" if row[column] else "0" for column in COLUMNS)
        lines.append(f"| {name} | {row['family']} | {' | '.join(figures)} |")
    lines += ["", "## What is not served", "", "| family | what |", "| --- | --- |"]
    lines += [f"| {name} | {what} |" for name, what in NOT_SERVED.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the cases and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args()
    sys.path.insert(0, str(GOLDEN))
    golden = importlib.import_module("family_folders")
    import peft
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    every = golden.cases()
    results, failed = {}, []
    for name in given.cases or every:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measure(name, every[name], golden, Path(folder))
            except (AssertionError, UserError) as error:
                print(f"{name}: {error}", flush=True)
                failed.append(name)
                continue
        results[name] = {"family": every[name]["config"]["model_type"], **found}
        print(name, *(f"{column} {found[column]:.1e}" for column in COLUMNS), flush=True)
        if found["folder"] or max(found.values()) > TOLERANCE:
            failed.append(name)
    record = HERE / "families.json"
    before = json.loads(record.read_text())["rows"] if given.cases and record.exists() else {}
    rows = {name: (before | results)[name] for name in every if name in before | results}
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    record.write_text(json.dumps(versions | {"rows": rows}, indent=1) + "\n")
    (HERE / "families.md").write_text(table(rows, versions))
    if failed:
        sys.exit(f"above {TOLERANCE}, or not served: {', '.join(failed)}")


if __name__ == "__main__":
    main()
