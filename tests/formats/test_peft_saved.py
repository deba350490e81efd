"""What an adapter's folder holds besides its adapters: read, remembered by the tree, and written back."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxft
from jaxft import methods
from jaxft.errors import UserError
from jaxft.formats import check_exportable, load_adapter, save_adapter, saved_leaves
from jaxft.models import Config
from jaxft.models.transformer import initial_params
from jaxft.weights import Saved, Tied, saved_in

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def options(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def stored(folder, arrays, **settings):
    """A PEFT folder of these tensors: LoRA of rank 2 on q_proj, and what is given."""
    folder.mkdir()
    pair = {"lora_A": np.ones((2, 32), np.float32), "lora_B": np.ones((48, 2), np.float32)}
    lora = {
        f"model.layers.{layer}.self_attn.q_proj.{part}.weight": array
        for layer in range(settings.pop("layers", 3))
        for part, array in pair.items()
    }
    lora = {name: array[: settings.get("out", 48)] for name, array in lora.items()}
    safetensors.numpy.save_file(
        {PREFIX + name: np.ascontiguousarray(x) for name, x in (lora | arrays).items()},
        folder / WEIGHTS,
    )
    settings.pop("out", None)
    written = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(written | settings))
    return folder


def embedding(base):
    return np.asarray(base["embed"]["embedding"])


def plain(folder, base, arrays, **settings):
    out = base["layers"]["attention"]["q_proj"]["kernel"].shape[-1]
    layers = base["layers"]["attention"]["q_proj"]["kernel"].shape[0]
    return stored(folder, arrays, out=out, layers=layers, **settings)


def test_the_tree_remembers_what_a_folder_brought_in_through_whatever_is_done_to_it(
    golden, model_of, tmp_path
):
    """Partition, combine, jit, an optimizer's map and a copy to a device: the record has no leaf and goes along."""
    _, base = model_of("llama")
    tree = load_adapter(base, golden / "adapters/save_head")
    assert saved_in(tree) == Saved(whole=(("head/kernel", ()),))
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves({**tree, "saved": None}))
    method = methods.lora(rank=4, targets=("q_proj",))
    tree = jaxft.combine(*jaxft.partition(tree, method))
    tree = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))(tree)
    tree = jax.device_put(tree, jax.devices()[0])
    save_adapter(tree, tmp_path / "out")
    assert options(tmp_path / "out")["modules_to_save"] == ["lm_head"]
    head = tensors(golden / "adapters/save_head")[f"{PREFIX}lm_head.weight"]
    np.testing.assert_array_equal(tensors(tmp_path / "out")[f"{PREFIX}lm_head.weight"], head)


def test_the_record_is_no_part_of_a_merged_model(golden, model_of):
    _, base = model_of("llama")
    tree = load_adapter(base, golden / "adapters/save_head")
    assert jax.tree.structure(jaxft.merge(tree)) == jax.tree.structure(base)
    assert "saved" not in jaxft.base_tree(tree)
    assert "saved" not in load_adapter(base, golden / "adapters/lora")


def test_what_a_method_trains_beside_its_adapters_is_saved_without_naming_it(model_of, tmp_path):
    _, base = model_of("llama")
    method = methods.lora(rank=2, targets=("q_proj",), train_also=("head", "final_norm"))
    tree = jaxft.adapt(base, method, jax.random.key(0))
    tree["head"] = {"kernel": tree["head"]["kernel"] + 1.0}
    save_adapter(tree, tmp_path / "out")
    assert options(tmp_path / "out")["modules_to_save"] == ["lm_head", "model.norm"]
    np.testing.assert_array_equal(
        load_adapter(base, tmp_path / "out")["head"]["kernel"], tree["head"]["kernel"]
    )


def test_naming_more_leaves_does_not_lose_those_remembered(golden, model_of, tmp_path):
    tree = load_adapter(model_of("llama")[1], golden / "adapters/save_head")
    save_adapter(tree, tmp_path / "out", trained=["attention_norm"])
    assert options(tmp_path / "out")["modules_to_save"] == ["input_layernorm", "lm_head"]


def test_a_module_of_one_layer_comes_back_as_that_layers(golden, model_of, tmp_path):
    tree = load_adapter(model_of("llama")[1], golden / "adapters/one_layer_saved")
    assert saved_in(tree).whole[0] == ("layers/mlp/down_proj/kernel", (1,))
    save_adapter(tree, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(golden / "adapters/one_layer_saved").keys()


@pytest.mark.parametrize("name", ["embedding_bf16", "head_tied_bf16", "save_head_bf16"])
def test_what_peft_stored_in_bfloat16_is_read_in_the_trees_own_dtype(golden, model_of, name):
    folder = golden / "adapters" / name
    _, base = model_of(options(folder)["base_model_name_or_path"].split("/")[-1])
    tree = load_adapter(base, folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_a_head_tied_to_an_embedding_in_bfloat16_stays_tied(golden, model_of):
    tree = load_adapter(model_of("llama_tied")[1], golden / "adapters/head_tied_bf16")
    assert isinstance(tree["head"]["kernel"].base, Tied)
    rounded = embedding(model_of("llama_tied")[1]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(tree["embed"]["embedding"], rounded)


def test_a_trained_head_keeps_its_digits_over_a_narrower_base(golden, model_of):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model_of("llama")[1])
    tree = load_adapter(half, golden / "adapters/save_head")
    assert tree["head"]["kernel"].dtype == jnp.float32
    assert tree["embed"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_embeddings_kept_beside_an_adapter_take_the_place_of_a_resized_bases_own(
    model_of, tmp_path, name
):
    """`save_embedding_layers=True`: the rows of new tokens are random in every base that was resized anew."""
    _, base = model_of(name)
    theirs = embedding(base).copy()
    theirs[-4:] += 1.0
    head = theirs if name == "llama_tied" else np.asarray(base["head"]["kernel"]).T
    arrays = {"model.embed_tokens.weight": theirs, "lm_head.weight": head}
    tree = load_adapter(base, plain(tmp_path / "in", base, arrays))
    np.testing.assert_array_equal(tree["embed"]["embedding"], theirs)
    assert isinstance(tree["head"]["kernel"], Tied) == (name == "llama_tied")
    save_adapter(tree, tmp_path / "out")
    assert options(tmp_path / "out")["modules_to_save"] is None
    for key, array in arrays.items():
        np.testing.assert_array_equal(tensors(tmp_path / "out")[PREFIX + key], array)


def test_embeddings_of_another_base_are_refused(model_of, tmp_path):
    _, base = model_of("llama_tied")
    own = embedding(base)
    other = plain(tmp_path / "other", base, {"model.embed_tokens.weight": own + 1.0})
    with pytest.raises(UserError, match=r"embed_tokens.weight is not this base's"):
        load_adapter(base, other)
    both = {"model.embed_tokens.weight": own, "lm_head.weight": own * np.float32(1.0001)}
    with pytest.raises(
        UserError, match=r"embed_tokens.weight differs from .*lm_head.weight, and the base ties"
    ):
        load_adapter(base, plain(tmp_path / "both", base, both))
    larger = {"model.embed_tokens.weight": np.concatenate([own + 1.0, own[:4]])}
    with pytest.raises(UserError, match=r"embed_tokens.weight is not this base's"):
        load_adapter(base, plain(tmp_path / "larger", base, larger))


def test_a_module_saved_whole_that_is_stored_twice_is_read_once(model_of, tmp_path):
    """`save_embedding_layers` beside `modules_to_save`: PEFT stores the wrapper's insides too."""
    _, base = model_of("llama_tied")
    whole, own = embedding(base) + 0.5, embedding(base)
    name = "model.embed_tokens"
    arrays = {
        f"{name}.modules_to_save.weight": whole,
        f"{name}.original_module.weight": own,
        f"{name}.weight": whole,
        "lm_head.weight": own,
    }
    folder = plain(tmp_path / "in", base, arrays, modules_to_save=["embed_tokens"])
    tree = load_adapter(base, folder)
    np.testing.assert_array_equal(tree["embed"]["embedding"], whole)
    np.testing.assert_array_equal(tree["head"]["kernel"], own.T)


def test_an_embedding_and_the_head_tied_to_it_saved_alike_stay_tied(model_of, tmp_path):
    _, base = model_of("llama_tied")
    whole = embedding(base) + 0.5
    arrays = {"model.embed_tokens.weight": whole, "lm_head.weight": whole}
    saving = {"modules_to_save": ["embed_tokens", "lm_head"]}
    folder = plain(tmp_path / "in", base, arrays, **saving)
    assert saved_leaves(base, folder) == ("embed/embedding",)
    assert isinstance(load_adapter(base, folder)["head"]["kernel"], Tied)


BIASES = {
    "of all": ("llama_bias", ("*_proj",), ("bias",), "all"),
    "of adapted modules": ("qwen2", ("q_proj", "v_proj"), ("q_proj/bias",), "lora_only"),
    "of others": ("qwen2", ("o_proj",), ("q_proj/bias",), "all"),
}


@pytest.mark.parametrize(("name", "targets", "also", "bias"), BIASES.values(), ids=BIASES.keys())
def test_training_biases_alone_writes_biases_alone(model_of, tmp_path, name, targets, also, bias):
    _, base = model_of(name)
    method = methods.lora(rank=2, targets=targets, train_also=also)
    tree = jaxft.adapt(base, method, jax.random.key(0))
    attention = tree["layers"]["attention"]
    moved = {**attention["q_proj"], "bias": attention["q_proj"]["bias"] + 1.0}
    tree["layers"] = {**tree["layers"], "attention": {**attention, "q_proj": moved}}
    save_adapter(tree, tmp_path / "out", method=method)
    written = options(tmp_path / "out")
    assert (written["bias"], written["modules_to_save"]) == (bias, None)
    assert all("lora_" in key or key.endswith(".bias") for key in tensors(tmp_path / "out"))
    read = load_adapter(base, tmp_path / "out")["layers"]["attention"]["q_proj"]["bias"]
    np.testing.assert_array_equal(read, moved["bias"])


def test_biases_of_layers_of_two_structures_stand_each_in_its_own_segment(tmp_path):
    wider = ((2, ()), (1, (("intermediate", 28),)))
    config = Config("llama", 24, 16, 20, 3, 4, 2, 4, 32, attention_bias=True, parts=wider)
    base = initial_params(config, jax.random.key(0))
    method = methods.lora(rank=2, targets=("q_proj",), train_also=("q_proj/bias",))
    adapted = jaxft.adapt(base, method, jax.random.key(1))
    for start, name in ((0.0, "layers_0"), (100.0, "layers_1")):
        part = adapted[name]["attention"]["q_proj"]
        part["bias"] = start + jnp.arange(part["bias"].size, dtype=float).reshape(
            part["bias"].shape
        )
    save_adapter(adapted, tmp_path / "out", method=method)
    read = load_adapter(base, tmp_path / "out")
    for name in ("layers_0", "layers_1"):
        found, expected = (one[name]["attention"]["q_proj"]["bias"] for one in (read, adapted))
        np.testing.assert_array_equal(found, expected)


def test_biases_of_layers_without_an_adapter_are_not_lost(model_of, tmp_path):
    _, base = model_of("qwen2")
    settings = {"targets": ("q_proj",), "train_also": ("q_proj/bias",)}
    method = methods.lora(rank=2, layers_to_transform=(0,), **settings)
    save_adapter(jaxft.adapt(base, method, jax.random.key(0)), tmp_path / "out", method=method)
    assert options(tmp_path / "out")["bias"] == "all"
    assert f"{PREFIX}model.layers.1.self_attn.q_proj.bias" in tensors(tmp_path / "out")


def test_a_whole_embedding_goes_with_an_adapter_on_an_untied_head(model_of, tmp_path):
    _, base = model_of("llama")
    method = methods.lora(rank=2, targets=("head",), train_also=("embed",))
    tree = jaxft.adapt(base, method, jax.random.key(0))
    tree["embed"] = {"embedding": tree["embed"]["embedding"] + 1.0}
    check_exportable(tree, method)
    save_adapter(tree, tmp_path / "out", method=method)
    assert options(tmp_path / "out")["modules_to_save"] == ["embed_tokens"]
    read = load_adapter(base, tmp_path / "out")
    np.testing.assert_array_equal(read["embed"]["embedding"], tree["embed"]["embedding"])


NUMBERS = {"NaN": np.nan, "infinite numbers": np.inf, "numbers beyond float16": 1e5}


@pytest.mark.parametrize(("what", "number"), NUMBERS.items(), ids=NUMBERS.keys())
@pytest.mark.parametrize("part", ["q_proj.lora_B", "lm_head"])
def test_what_cannot_be_computed_with_is_refused_by_its_name(
    golden, model_of, copy_of, part, what, number
):
    _, base = model_of("llama")
    folder = copy_of("adapters/save_head")
    arrays = tensors(folder)
    key = next(key for key in arrays if part in key)
    arrays[key] = arrays[key].copy()
    arrays[key][-1, -1] = number
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), base)
    if what == "numbers beyond float16" and part == "lm_head":
        assert load_adapter(half, folder, dtype="float16")["head"]["kernel"].dtype == jnp.float32
        return
    with pytest.raises(UserError, match=f"{key} holds {what}, .* before its training diverged"):
        load_adapter(half, folder, dtype="float16")


def test_notes_that_libraries_make_for_themselves_change_nothing(copy_of, edit, golden, model_of):
    folder = copy_of("adapters/lora")
    edit(folder / "adapter_config.json", _from_model_config=True)
    _, base = model_of("llama")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_adapter(base, folder),
        load_adapter(base, golden / "adapters/lora"),
    )


def test_a_whole_adapter_is_put_on_shapes_alone(golden, model_of):
    """`jaxft plan` of a run that goes on from an adapter."""
    for name in (
        "embedding",
        "head_tied_bf16",
        "save_embedding_tied",
        "bias_lora_only",
        "one_layer_saved",
    ):
        folder = golden / "adapters" / name
        _, base = model_of(options(folder)["base_model_name_or_path"].split("/")[-1])
        shapes = jax.eval_shape(lambda params, folder=folder: load_adapter(params, folder), base)
        tree = load_adapter(base, folder)
        assert jax.tree.structure(shapes) == jax.tree.structure(tree)
