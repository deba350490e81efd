"""jaxft.formats.peft: adapters that PEFT wrote, read; what is written, read by PEFT."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxft
from jaxft import methods
from jaxft.errors import UserError
from jaxft.formats import check_exportable, load_adapter, save_adapter
from jaxft.models.families import module_names
from jaxft.tree import flatten_with_paths
from jaxft.weights import DoRA, LoRA, VeRA, is_weight

GOLDEN = Path(__file__).parent.parent / "golden"
ADAPTERS = sorted(path.name for path in (GOLDEN / "adapters").iterdir() if path.is_dir())
KERNEL = "base_model.model.model.layers.1.self_attn.q_proj"


def base_of(folder):
    options = json.loads((folder / "adapter_config.json").read_text())
    return Path(options["base_model_name_or_path"]).name


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def store(folder, arrays):
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft_and_the_round_trip_is_exact(
    golden, model_of, logits_of, deviation, tmp_path, name
):
    folder = golden / "adapters" / name
    model, base = model_of(base_of(folder))
    adapted = load_adapter(base, folder)
    expected = np.load(folder / "expected.npz")
    assert deviation(logits_of(model, adapted, expected["input_ids"]), expected["logits"]) < 1e-4
    save_adapter(adapted, tmp_path / "out")
    assert_same(load_adapter(base, tmp_path / "out"), adapted)
    read, written = tensors(folder), tensors(tmp_path / "out")
    assert written.keys() - {"base_model.vera_A", "base_model.vera_B"} == read.keys() - {
        "base_model.vera_A",
        "base_model.vera_B",
    }
    for key, array in read.items():
        np.testing.assert_array_equal(written[key], array)
    options = [
        json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "out")
    ]
    assert options[0]["bias"] == options[1]["bias"]


def test_the_kind_of_weight_follows_the_file(golden, model_of):
    kinds = {"lora": LoRA, "dora": DoRA, "vera": VeRA, "rslora": LoRA}
    _, base = model_of("llama")
    for name, kind in kinds.items():
        tree = load_adapter(base, golden / "adapters" / name)
        assert type(tree["layers"]["attention"]["q_proj"]["kernel"]) is kind
    assert tree["layers"]["attention"]["q_proj"]["kernel"].scale.tolist() == [3.0] * 3


def test_ranks_are_padded_in_the_tree_and_true_on_disk(golden, model_of, tmp_path):
    _, base = model_of("llama")
    adapted = load_adapter(base, golden / "adapters/patterns")
    weight = adapted["layers"]["attention"]["q_proj"]["kernel"]
    assert weight.ranks == (2, 4, 4)
    assert weight.a.shape == (3, 32, 4)
    save_adapter(adapted, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert stored[KERNEL.replace(".1.", ".0.") + ".lora_A.weight"].shape == (2, 32)


def test_layers_without_an_adapter_have_rank_0(golden, model_of):
    _, base = model_of("llama")
    weight = load_adapter(base, golden / "adapters/layers")["layers"]["mlp"]["up_proj"]["kernel"]
    assert weight.ranks == (4, 0, 4)
    assert weight.scale.tolist() == [1.5, 0.0, 1.5]


def test_older_spellings_of_the_names_are_read(copy_of, golden, model_of):
    """The adapter's name stood in each, and DoRA's magnitude had a `.weight`."""
    folder = copy_of("adapters/dora")
    old = {
        key.replace("_A.weight", "_A.default.weight")
        .replace("_B.weight", "_B.default.weight")
        .replace("_vector", "_vector.default.weight"): array
        for key, array in tensors(folder).items()
    }
    store(folder, old)
    _, base = model_of("llama")
    assert_same(load_adapter(base, folder), load_adapter(base, golden / "adapters/dora"))


def test_a_module_saved_whole_may_carry_its_wrappers_name(copy_of, golden, model_of):
    folder = copy_of("adapters/save_head")
    wrapped = "lm_head.modules_to_save.default.weight"
    store(folder, {key.replace("lm_head.weight", wrapped): x for key, x in tensors(folder).items()})
    _, base = model_of("llama")
    assert_same(load_adapter(base, folder), load_adapter(base, golden / "adapters/save_head"))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(mlp|self_attn)\.(?![qv]_).*"},
    ],
)
def test_targets_are_a_list_a_regular_expression_or_all(copy_of, edit, golden, model_of, changes):
    folder = copy_of("adapters/rslora")
    edit(folder / "adapter_config.json", **changes)
    _, base = model_of("llama")
    assert_same(load_adapter(base, folder), load_adapter(base, golden / "adapters/rslora"))


def test_a_tied_head_is_untied_only_where_it_must_be(golden, model_of, tmp_path):
    _, base = model_of("llama_tied")
    read = load_adapter(base, golden / "adapters/save_embedding_tied")
    np.testing.assert_array_equal(read["head"]["kernel"], base["embed"]["embedding"].T)
    method = methods.lora(rank=2, train_also=("embed",))
    tree = jaxft.adapt(base, method, jax.random.key(0))
    tree["embed"] = {"embedding": 2 * base["embed"]["embedding"]}
    save_adapter(tree, tmp_path / "out", method=method)
    assert {"base_model.model.lm_head.weight"} < tensors(tmp_path / "out").keys()
    assert_same(load_adapter(base, tmp_path / "out"), tree)


EXPORTED = {
    "lora": ("qwen2", methods.lora(rank=6, alpha=7, targets=("q_proj", "head", "embed"))),
    "rslora": ("llama", methods.rslora(rank=6, alpha=7)),
    "lora_fa": ("gpt2", methods.lora_fa(rank=4)),
    "delta_lora": (
        "llama",
        methods.delta_lora(rank=3, rank_pattern={"layers.0.self_attn.q_proj": 2}),
    ),
    "delta_lora_late": ("llama", methods.delta_lora(rank=3, start_step=2)),
    "tied_adapter": (
        "llama_tied",
        methods.lora(rank=4, targets=("embed", "q_proj"), tie_adapters=True),
    ),
    "norms": ("gpt2", methods.lora(rank=4, train_also=("mlp_norm", "final_norm", "positions"))),
    "biases": (
        "llama_bias",
        methods.lora(rank=4, targets=("q_proj", "up_proj"), train_also=("bias",)),
    ),
    "biases_gpt2": ("gpt2", methods.dora(rank=4, train_also=("bias",))),
    "vera": (
        "llama",
        methods.vera(
            rank=4,
            targets=("q_proj", "down_proj"),
            layers_to_transform=(1,),
            train_also=("k_proj/kernel", "head"),
        ),
    ),
    "embedding": ("llama_tied", methods.lora(rank=4, train_also=("embed",))),
    "two_c_proj": ("gpt2", methods.lora(rank=4, targets=("head", "o_proj"))),
    "rsdora": ("gemma2", methods.dora(rank=4, rank_stabilized=True, train_also=("post_mlp_norm",))),
}


def trained(model, base, method):
    """A tree as training would leave it: every trainable place moved, the padding still zero."""
    names = module_names(model.config)
    tree = jaxft.adapt(base, method, jax.random.key(1), names=names)
    tree = _moved(tree, method, np.random.default_rng(0))
    for _, event in method.events:
        tree = _moved(event(tree), method, np.random.default_rng(1))
    return tree


def _moved(tree, method, draw):
    trainable, frozen = jaxft.partition(tree, method)

    def move(leaf):
        if leaf is None:
            return None
        parts = ("a", "b", "d", "g", "magnitude") if is_weight(leaf) else ()
        moved = {part: getattr(leaf, part, None) for part in parts}
        moved = {part: x for part, x in moved.items() if x is not None and not isinstance(x, tuple)}
        if not is_weight(leaf):
            return leaf + 0.3 * draw.normal(size=leaf.shape).astype(leaf.dtype)
        for part, x in moved.items():
            noise = (0.3 * draw.normal(size=x.shape)).astype(np.float32)
            stacked = noise if len(leaf.ranks) > 1 else noise[None]
            for layer, rank in enumerate(leaf.ranks):
                padding = {"a": np.s_[:, rank:], "b": np.s_[rank:], "d": np.s_[rank:]}
                stacked[layer][padding.get(part, np.s_[:] if rank == 0 else np.s_[:0])] = 0
            moved[part] = x + noise
        return dataclasses.replace(leaf, **moved)

    is_leaf = lambda leaf: is_weight(leaf) or leaf is None  # noqa: E731
    return jaxft.combine(jax.tree.map(move, trainable, is_leaf=is_leaf), frozen)


def written(model_of, tmp_path, name):
    base_name, method = EXPORTED[name]
    model, base = model_of(base_name)
    tree = trained(model, base, method)
    check_exportable(tree, method)
    save_adapter(tree, tmp_path / "out", method=method, base=base_name)
    return model, base, tree


def dense(tree):
    """{path: array} of the merged tree, its head an array of its own."""
    merged = jaxft.merge(tree)
    head = jaxft.materialize(jaxft.bind(merged["head"]["kernel"], merged))
    return dict(flatten_with_paths(merged | {"head": {"kernel": head}}))


@pytest.mark.parametrize("name", EXPORTED)
def test_every_method_is_written_as_an_adapter_that_computes_the_same(model_of, tmp_path, name):
    _, base, tree = written(model_of, tmp_path, name)
    expected = dense(tree)
    merged = dense(load_adapter(base, tmp_path / "out"))
    assert merged.keys() == expected.keys()
    for path, leaf in merged.items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def test_what_is_written_is_small_and_says_what_it_is(model_of, tmp_path):
    written(model_of, tmp_path, "two_c_proj")
    options = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert options["target_modules"] == ["attn.c_proj", "lm_head"]
    assert options["fan_in_fan_out"] is True
    assert (options["r"], options["lora_alpha"], options["rank_pattern"]) == (4, 32, {})
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: gpt2" in card
    assert "method: lora, rank 4" in card
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


def test_rslora_is_written_as_such(model_of, tmp_path):
    written(model_of, tmp_path, "rslora")
    options = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (options["use_rslora"], options["r"], options["lora_alpha"]) == (True, 6, 7)


def _without(part):
    def spoil(folder):
        store(folder, {key: array for key, array in tensors(folder).items() if part not in key})

    return spoil


def _with(key, *shape):
    return lambda folder: store(folder, tensors(folder) | {key: np.ones(shape, np.float32)})


def _pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


BAD = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json; there"),
    "broken": (lambda f: (f / "adapter_config.json").write_text("{"), "json: not JSON"),
    "pickle": (_pickled, "adapter_model.bin is a pickle"),
    "truncated": (_truncated, "truncated"),
    "no B": (_without("0.self_attn.q_proj.lora_B"), "0.self_attn.q_proj.lora_B is missing"),
    "no layer": (_without("1.self_attn.q_proj"), "layers.1.self_attn.q_proj is missing"),
    "empty": (lambda f: store(f, {"lora": np.ones(1, np.float32)}), "lora is not used"),
    "unused": (_with(f"{KERNEL.replace('q_', 'z_')}.lora_A.weight", 4, 32), "nearest: .*q_proj"),
    "magnitude": (_with(f"{KERNEL}.lora_magnitude_vector", 32), "magnitude_vector is not used"),
    "untargeted": (
        lambda f: store(
            f, tensors(f) | {k.replace("q_proj", "o_proj"): x for k, x in tensors(f).items()}
        ),
        "o_proj is not used: target_modules does not name it",
    ),
    "dense": (_with("base_model.model.model.norm.weight", 32), "nothing in modules_to_save"),
    "bias": (_with(f"{KERNEL}.bias", 32), "the base has no bias there"),
    "shape": (
        _with(f"{KERNEL}.lora_A.weight", 4, 30),
        r"shape \[4, 30\], but the base's kernel \[32, 32\] .in, out. needs \[4, 32\]",
    ),
    "rank": (_with(f"{KERNEL}.lora_A.weight", 5, 32), r"\[5, 32\], .* needs \[4, 32\]"),
    "integers": (lambda f: store(f, {f"{KERNEL}.lora_A.weight": np.ones(1, np.int32)}), "is I32"),
}
BAD_CONFIG = {
    "kind": ({"peft_type": "LOHA"}, "'LOHA' is not known to jaxft, which reads LORA, VERA"),
    "option": ({"lora_bias": True}, "lora_bias = True changes the adapter"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "tokens": (
        {"trainable_token_indices": [1]},
        "embed_tokens.token_adapter.trainable_tokens_delta is missing, which trainable_token_indices",
    ),
    "token": ({"trainable_token_indices": [1, 1]}, "trainable_token_indices takes a list of token"),
    "token's module": (
        {"trainable_token_indices": {"norm": [1]}},
        "trainable_token_indices: 'norm' is neither the embedding nor the head",
    ),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base too"),
    "rank": ({"r": 0}, "r takes a whole number from 1 to 65536, not 0"),
    "alpha": ({"lora_alpha": "6"}, "lora_alpha takes a number, not '6'"),
    "targets": (
        {"target_modules": 3},
        "target_modules takes a list or a regular expression, not 3",
    ),
    "target": ({"target_modules": ["q_prj"]}, "has no module 'q_prj' .nearest: 'q_proj'"),
    "saved": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing, which modules_to_save"),
    "rank text": ({"r": "4"}, "r takes a whole number from 1 to 65536, not '4'"),
    "vast": ({"r": 10**12}, "r takes a whole number from 1 to 65536"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha takes a number, not nan"),
    "pattern": (
        {"rank_pattern": {"q_proj": 4.0}},
        "rank_pattern takes an object of names and rank",
    ),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout takes a rate"),
    "flag": ({"use_dora": "yes"}, "use_dora takes true or false, not 'yes'"),
    "dora alpha": ({"use_dora": True, "lora_alpha": 0}, "an alpha of 0 is not known"),
    "kind list": ({"peft_type": ["LORA"]}, "is not known to jaxft"),
    "for ever": ({"target_modules": "([a-z._0-9]+)+X"}, "processor time"),
    "expression": ({"target_modules": "("}, "is no regular expression"),
    "another rank": ({"r": 8}, r"\[4, 32\], .* needs \[8, 32\]"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector is missing"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_one_clear_line(copy_of, edit, model_of, spoil, message):
    folder = copy_of("adapters/rslora")
    store(folder, {key: x for key, x in tensors(folder).items() if "q_proj" in key})
    edit(folder / "adapter_config.json", target_modules=["q_proj"])
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(model_of("llama")[1], folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIG.values(), ids=BAD_CONFIG.keys())
def test_a_bad_config_is_one_clear_line(copy_of, edit, model_of, changes, message):
    folder = copy_of("adapters/rslora")
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(model_of("llama")[1], folder)


def test_another_base_is_refused(golden, model_of, tmp_path):
    with pytest.raises(UserError, match=r"layers.2.* is not used: the base has no such module"):
        load_adapter(model_of("llama_bias")[1], golden / "adapters/lora")
    with pytest.raises(UserError, match="no such folder"):
        load_adapter(model_of("llama")[1], tmp_path / "absent")
    adapted = load_adapter(model_of("llama")[1], golden / "adapters/lora")
    with pytest.raises(UserError, match=r"is adapted already: call jaxft.merge first"):
        load_adapter(adapted, golden / "adapters/lora")


def test_an_unsaved_projection_is_drawn_and_a_lost_one_missed(copy_of, model_of):
    folder = copy_of("adapters/vera")
    store(folder, {key: x for key, x in tensors(folder).items() if "vera_A" not in key})
    with pytest.raises(UserError, match=r"base_model.vera_A is missing, though save_projection"):
        load_adapter(model_of("llama")[1], folder)


def test_what_peft_has_no_place_for_is_refused_before_training(model_of, tmp_path):
    _, base = model_of("llama_tied")
    method = methods.lora(rank=2, targets=("head",), train_also=("embed",))
    tree = jaxft.adapt(base, method, jax.random.key(0))
    with pytest.raises(UserError, match="the head tied to it is adapted"):
        check_exportable(tree, method)
    method = methods.lora(rank=2, targets=("q_proj",), train_also=("q_proj/kernel/base",))
    tree = jaxft.adapt(base, method, jax.random.key(0))
    with pytest.raises(UserError, match=r"q_proj/kernel is adapted; PEFT's format holds"):
        check_exportable(tree, method)
    method = methods.dora(rank=2, targets=("embed",), tie_adapters=True)
    tree = jaxft.adapt(base, method, jax.random.key(0))
    with pytest.raises(UserError, match="no place for this adapter with tie_adapters"):
        check_exportable(tree, method)
    check_exportable(base, methods.full())


def test_one_kind_of_adapter_in_a_file_and_one_adapter_in_a_folder(model_of, tmp_path):
    _, base = model_of("llama")
    with pytest.raises(UserError, match="the tree holds no adapter"):
        save_adapter(base, tmp_path / "out")
    tree = jaxft.adapt(base, methods.lora(rank=2, targets=("q_proj",)), jax.random.key(0))
    both = jaxft.adapt(tree, methods.dora(rank=2, targets=("v_proj",)), jax.random.key(0))
    with pytest.raises(UserError, match=r"of one kind, the tree holds LoRA .*, DoRA"):
        save_adapter(both, tmp_path / "out")
    save_adapter(tree, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; jaxft overwrites nothing"):
        save_adapter(tree, tmp_path / "out")
    save_adapter(tree, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _check_written():
    """The script that asks PEFT, as a module."""
    spec = importlib.util.spec_from_file_location("check_written", GOLDEN / "check_written.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.reference
@pytest.mark.parametrize("name", [*EXPORTED, *ADAPTERS])
def test_peft_loads_what_was_written_with_the_same_logits(model_of, logits_of, tmp_path, name):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    logging.disable(logging.ERROR)
    if name in EXPORTED:
        base_name = EXPORTED[name][0]
        model, _, tree = written(model_of, tmp_path, name)
    else:
        folder = GOLDEN / "adapters" / name
        base_name = base_of(folder)
        model, base = model_of(base_name)
        tree = load_adapter(base, folder)
        save_adapter(tree, tmp_path / "out")
    ids = np.random.default_rng(0).integers(3, 96, (2, 8))
    np.savez(tmp_path / "expected.npz", input_ids=ids, logits=logits_of(model, tree, ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = _check_written()
        read, problems = check.load_base(GOLDEN / "models" / base_name)
        read, more = check.load_adapter(read, tmp_path / "out")
        assert problems + more == []
        assert check.deviation(read, tmp_path / "expected.npz") < 1e-4


def test_an_adapter_takes_the_dtype_asked_for_and_the_base_keeps_its_own(golden, model_of):
    params = load_adapter(model_of("llama")[1], golden / "adapters/dora", dtype="bfloat16")
    weight = params["layers"]["attention"]["q_proj"]["kernel"]
    assert {weight.a.dtype, weight.b.dtype, weight.magnitude.dtype} == {jnp.dtype("bfloat16")}
    assert weight.base.dtype == weight.scale.dtype == jnp.dtype("float32")
    with pytest.raises(UserError, match=r"load_adapter: dtype 'bf16' is not known"):
        load_adapter(model_of("llama")[1], golden / "adapters/lora", dtype="bf16")


def test_the_base_is_written_as_it_was_named(model_of, tmp_path):
    method = methods.lora(rank=2)
    tree = jaxft.adapt(model_of("llama")[1], method, jax.random.key(0))
    save_adapter(tree, tmp_path / "out", method=method, base="models/base")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "models/base"
    assert str(Path.home()) not in (tmp_path / "out/README.md").read_text()
