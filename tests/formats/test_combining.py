"""jaxft.formats.combining: adapters' folders made one, as PEFT's `add_weighted_adapter` makes them."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.formats import combining, load, load_adapter
from jaxft.formats.combining import combine_folders, merge_adapters
from jaxft.formats.manifest import write_manifest
from jaxft.formats.safetensors import open_folder
from jaxft.tree import flatten_with_paths
from jaxft.weights import is_weight, materialize

PREFIX = "base_model.model."


def factors(folder) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"a": (in, rank), "b": (rank, out)}} as stored."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, stored in open_folder(folder, "adapter_model").items():
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        if rest:
            found.setdefault(module, {})["a" if "A" in rest else "b"] = stored.read().T
    return found


@functools.cache
def expected(golden):
    """{case: (what combined.json says, {module: {"a", "b", "keep": masks}})}."""
    told = json.loads((golden / "combined.json").read_text())
    made = {case: (about, {}) for case, about in told.items()}
    with np.load(golden / "combined.npz") as arrays:
        for name, array in arrays.items():
            case, module, part, *number = name.split("/")
            one = made[case][1].setdefault(module, {"keep": []})
            if number:
                one["keep"].append(array)
            else:
                one[part] = array
    return made


CASES = (
    "linear", "cat", "svd", "ties", "ties_negative", "ties_frequency", "ties_svd", "dare_linear", "dare_linear_svd",
    "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd", "cat_ranks", "svd_ranks", "rslora_first",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_way_makes_what_peft_makes(golden, tmp_path, monkeypatch, case):
    about, modules = expected(golden)[case]
    masks = {module: iter(one["keep"]) for module, one in modules.items()}

    def recorded(density, seed, module):
        return lambda x: np.unpackbits(next(masks[module]), count=x.size).reshape(x.shape) > 0

    monkeypatch.setattr(combining, "random_keep", recorded)
    adapters = [golden / "adapters" / name for name in about["adapters"]]
    options = {
        key: about[key]
        for key in ("weights", "combine", "density", "rank", "majority")
        if key in about
    }
    combine_folders(adapters, tmp_path / "out", **options)
    made = factors(tmp_path / "out")
    assert made.keys() == modules.keys()
    for module, one in modules.items():
        wanted, found = one["a"] @ one["b"], made[module]["a"] @ made[module]["b"]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert (
        config["use_rslora"] is False
    )  # PEFT keeps the first's: its scale is then the root of the rank
    assert about["scale"] == (2.0 if case == "rslora_first" else 1.0)


@pytest.mark.parametrize("names", [("layers", "patterns"), ("embedding", "rslora")])
def test_cat_adds_the_updates_up_whatever_their_layers_ranks_and_targets(golden, tmp_path, names):
    _, params = load(golden / "models/llama")
    folders = [golden / "adapters" / name for name in names]
    deviation = combine_folders(folders, tmp_path / "out", weights=[2.0, -0.5])
    assert deviation < 1e-6

    def kernels(folder):
        tree = load_adapter(params, folder)
        return {
            p: materialize(leaf)
            for p, leaf in flatten_with_paths(tree, is_leaf=is_weight)
            if is_weight(leaf)
        }

    base = dict(flatten_with_paths(params, is_leaf=is_weight))
    made, ones = kernels(tmp_path / "out"), [kernels(folder) for folder in folders]
    assert made.keys() == ones[0].keys() | ones[1].keys()
    for path, kernel in made.items():
        deltas = [one[path] - base[path] if path in one else 0 * base[path] for one in ones]
        np.testing.assert_allclose(
            kernel - base[path], 2.0 * deltas[0] - 0.5 * deltas[1], atol=1e-5
        )


@pytest.mark.thorough  # each half is tested by itself
def test_with_a_model_what_is_combined_is_merged_into_it(
    golden, logits_of, deviation, tmp_path, capsys
):
    folders = [golden / "adapters" / name for name in ("head", "rslora")]
    combine_folders(folders, tmp_path / "one", weights=[0.7, -0.4])
    merge_adapters(folders, tmp_path / "out", golden / "models/llama", weights=[0.7, -0.4])
    assert "merged: on" in capsys.readouterr().out
    model, params = load(golden / "models/llama")
    ids = np.arange(8, dtype=np.int32)[None] + 3
    wanted = logits_of(model, load_adapter(params, tmp_path / "one"), ids)
    assert deviation(logits_of(*load(tmp_path / "out"), ids), wanted) < 1e-5


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 4e-3), ("float16", 5e-4)])
def test_an_adapter_is_stored_narrow_and_the_deviation_told(golden, tmp_path, capsys, dtype, most):
    found = merge_adapters([golden / "adapters/lora"], tmp_path / "out", dtype=dtype, weights=[1.0])
    assert most / 20 < found < most
    assert f"{found:.2g} of its size away" in capsys.readouterr().out
    narrow, wide = (sum(t.nbytes for t in open_folder(f, "adapter_model").values())
                    for f in (tmp_path / "out", golden / "adapters/lora"))  # fmt: skip
    assert 2 * narrow == wide
    load_adapter(load(golden / "models/llama")[1], tmp_path / "out")


def test_one_adapter_alone_is_scaled_or_cut_to_a_lower_rank(golden, tmp_path):
    merge_adapters([golden / "adapters/lora"], tmp_path / "cut", combine="svd", rank=2)
    merge_adapters([golden / "adapters/lora"], tmp_path / "twice", weights=[2.0])
    module = "model.layers.0.self_attn.q_proj"
    one = {name: factors(tmp_path / name)[module] for name in ("cut", "twice")}
    assert one["cut"]["a"].shape[1] == 2
    own = factors(golden / "adapters/lora")[module]
    np.testing.assert_allclose(
        one["twice"]["a"] @ one["twice"]["b"], 3 * own["a"] @ own["b"], atol=1e-5
    )


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("head", "rslora"), {}, r"--weights is missing: one number for each .* as --weights 0\.5,0\.5"),
        (("head", "rslora"), {"weights": [1.0]}, "--weights has 1 number for 2 adapters"),
        (("head", "rslora"), {"combine": "tie"}, "unknown --combine 'tie'.*nearest: 'ties'"),
        (("head", "rslora"), {"combine": "ties"}, "--combine ties needs --density"),
        (("head", "rslora"), {"density": 0.5}, "--density goes with other ways: --combine cat prunes nothing"),
        (("head", "rslora"), {"combine": "linear", "rank": 2}, "--rank goes with other ways: --combine linear"),
        (("head", "rslora"), {"combine": "svd", "majority": "frequency"}, "--majority goes with other ways"),
        (("head", "rslora"), {"quantize": "nf4"}, "--quantize writes a model"),
        (("patterns", "rslora"), {"combine": "linear"}, "linear needs equal ranks: .*q_proj has the ranks 2, 4; svd"),
        (("rslora", "dora"), {}, "dora: use_dora = True: only plain LoRAs are combined"),
        (("vera", "rslora"), {}, "vera: peft_type = 'VERA': only plain"),
        (("rslora", "save_norm"), {}, "save_norm: modules_to_save = "),
        (("rslora", "bias_all"), {}, "bias_all: bias = 'all'"),
        (("rslora", "gpt2"), {}, r"adapters of different bases: .*models/llama\) and .*models/gpt2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_in_a_line(golden, tmp_path, names, options, message):
    weights = {} if "missing" in message else {"weights": [0.5, 0.5]}
    with pytest.raises(UserError, match=message):
        merge_adapters(
            [golden / "adapters" / n for n in names], tmp_path / "out", **weights | options
        )
    assert not (tmp_path / "out").exists()


def test_bases_are_told_apart_by_digests_and_by_shapes(golden, tmp_path):
    for name, digest in (("one", "1"), ("two", "2")):
        shutil.copytree(golden / "adapters/rslora", tmp_path / name)
        write_manifest(tmp_path / name, base={"model.safetensors": digest})
    with pytest.raises(UserError, match="adapters of different bases: "):
        combine_folders([tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=[1, 1])
    shutil.copytree(golden / "adapters/gemma2", tmp_path / "three")
    config = json.loads((tmp_path / "three/adapter_config.json").read_text())
    (tmp_path / "three/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(UserError, match=r"down_proj: is \d+ x \d+ and .*different bases"):
        combine_folders(
            [golden / "adapters/lora", tmp_path / "three"], tmp_path / "out", weights=[1, 1]
        )
