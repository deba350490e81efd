"""Quantized bases on disk: rounded while they stream, written and read as bitsandbytes does, merged."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load, save
from jaxft.formats.merge import merge_folder, quantize_folder
from jaxft.formats.safetensors import Lazy, open_folder, write_file
from jaxft.weights import is_weight, quantized_in


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_streaming_gives_what_quantizing_the_tree_gives(golden, model_of, scheme):
    """All projections, and neither the embedding nor the head nor the norms."""
    _, dense = model_of("llama")
    _, params = load(golden / "models/llama", quantize=scheme, group_size=8)
    assert_same(params, jaxft.quantize_params(dense, scheme, group_size=8))
    assert {path.split("/")[1] for path, _ in quantized_in(params)} == {"attention", "mlp"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"quantize": "nf4"},
        {"quantize": "nf4", "group_size": 32, "double_quant": False},
        {"quantize": "fp4"},
        {"quantize": "int8", "group_size": -1},
    ],
)
def test_a_bitsandbytes_folder_is_written_and_read_back(golden, tmp_path, name, settings):
    source = golden / "models" / name
    model, params = load(source, **settings)
    save(model, params, tmp_path / "out", like=source)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (settings["quantize"] == "int8")
    _, read = load(tmp_path / "out")
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert_same(read, params)


def test_a_quantized_folder_is_not_quantized_again(golden, tmp_path, capsys):
    relative = quantize_folder(golden / "models/llama", tmp_path / "out", "int8")
    assert 0 < relative < 0.1
    assert "quantized: on 124 tokens of random ids" in capsys.readouterr().out
    with pytest.raises(UserError, match="is quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "again")


def test_what_the_format_has_no_place_for_is_refused(golden, tmp_path):
    model, params = load(golden / "models/llama", quantize="int4", group_size=8)
    with pytest.raises(UserError, match="int4 in groups of 8: bitsandbytes"):
        save(model, params, tmp_path / "out")


@pytest.fixture
def adapter(golden, tmp_path):
    """A LoRA trained over llama in nf4, off its start."""
    _, params = load(golden / "models/llama", quantize="nf4")
    params = jaxft.adapt(params, jaxft.methods.lora(rank=2), jax.random.key(0))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1] == jax.tree_util.GetAttrKey("b") else leaf, params
    )
    jaxft.save_adapter(moved, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_tells_the_bases_quantization_and_merging_keeps_to_it(
    golden, adapter, tmp_path, capsys
):
    assert (
        "- the base was quantized: nf4, groups of 64, scales quantized too"
        in (adapter / "README.md").read_text()
    )
    assert merge_folder(golden / "models/llama", adapter, tmp_path / "dense") < 3e-5
    merge_folder(golden / "models/llama", adapter, tmp_path / "nf4", quantize="nf4")
    said = capsys.readouterr().out
    assert said.count("of the next tokens stay the same") == 3
    assert "merged, not yet quantized: on 124 tokens" in said
    assert quantized_in(load(tmp_path / "nf4")[1])


def test_an_adapter_trained_over_codes_is_not_merged_into_another_base(golden, adapter, tmp_path):
    with pytest.raises(
        UserError, match="was trained over another base: nf4 in groups of 64, digest"
    ):
        merge_folder(golden / "models/llama_linear", adapter, tmp_path / "out")


# What follows was compared with transformers 5.23 and bitsandbytes 0.50.2 on folders that these wrote: logits, and
# whether they load what is saved here.
SKIP = "llm_int8_skip_modules"
DOWN = "model.layers.1.mlp.down_proj"


def stored(folder):
    return {name: tensor.read() for name, tensor in open_folder(folder).items()}


def store(folder, arrays):
    lazy = {name: Lazy(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    write_file(folder / "model.safetensors", lazy)
    (folder / "manifest.json").unlink(missing_ok=True)


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def four_bits(golden, tmp_path):
    """A folder of llama in nf4, and its tree."""
    model, params = load(golden / "models/llama", quantize="nf4", group_size=32)
    save(model, params, tmp_path / "nf4", like=golden / "models/llama")
    return tmp_path / "nf4", params


@pytest.fixture
def dynamic(four_bits, edit):
    """The same with one module left out, by its name, and another threshold."""
    folder, params = four_bits
    arrays = stored(folder)
    kernel = np.asarray(jaxft.materialize(params["layers"]["mlp"]["down_proj"]["kernel"]))[1]
    arrays = {name: x for name, x in arrays.items() if not name.startswith(DOWN)}
    store(folder, arrays | {f"{DOWN}.weight": np.ascontiguousarray(2 * kernel.T)})
    changed = {SKIP: ["lm_head", DOWN], "bnb_4bit_compute_dtype": "bfloat16"}
    edit(folder / "config.json", quantization_config=settings_of(folder) | changed)
    return folder, params


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_codes_stored_as_floats_are_the_same_bytes(four_bits, dtype):
    folder, params = four_bits
    arrays = stored(folder)
    for name, x in arrays.items():
        if x.dtype == np.uint8 and x.shape[1:] == (1,):
            arrays[name] = x.reshape(-1).view(jax.numpy.dtype(dtype))[:, None]
    store(folder, arrays)
    _, read = load(folder)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert_same(read, params)


def test_codes_of_another_size_are_refused(four_bits):
    folder, _ = four_bits
    arrays = stored(folder)
    store(folder, arrays | {f"{DOWN}.weight": arrays[f"{DOWN}.weight"][:-2]})
    with pytest.raises(UserError, match=r"down_proj.weight is U8 .*; 640 bytes in one column"):
        load(folder)


def test_a_leaf_of_which_one_layer_is_dense_is_held_dense_and_written_as_it_was(
    dynamic, tmp_path, capsys
):
    folder, params = dynamic
    model, read = load(folder)
    assert "some layers of layers/mlp/down_proj/kernel are not quantized" in capsys.readouterr().err
    assert "layers/mlp/down_proj/kernel" not in dict(quantized_in(read))
    assert len(quantized_in(read)) == len(quantized_in(params)) - 1
    expected = jaxft.materialize(params["layers"]["mlp"]["down_proj"]["kernel"])
    kernel = read["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(kernel[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(kernel[1], 2 * expected[1], rtol=1e-6)
    save(model, read, tmp_path / "again", like=folder)
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(x.dtype == after[name].dtype for name, x in before.items())
    assert all(np.array_equal(x, after[name]) for name, x in before.items() if "state" not in name)
    written = settings_of(tmp_path / "again")
    assert written[SKIP] == ["lm_head", DOWN]
    assert written["bnb_4bit_compute_dtype"] == "bfloat16"


def test_what_changed_is_written_dense_and_named(dynamic, tmp_path):
    folder, _ = dynamic
    model, read = load(folder)
    leaf = read["layers"]["mlp"]["down_proj"]
    leaf["kernel"] = leaf["kernel"] * 2
    save(model, read, tmp_path / "again", like=folder)
    names = sorted(f"model.layers.{layer}.mlp.down_proj" for layer in range(model.config.layers))
    assert settings_of(tmp_path / "again")[SKIP] == ["lm_head", *names]
    _, again = load(tmp_path / "again")
    np.testing.assert_array_equal(again["layers"]["mlp"]["down_proj"]["kernel"], leaf["kernel"])


def test_a_kind_of_kernel_left_out_is_named_by_the_folders_own_list(four_bits, edit, tmp_path):
    folder, params = four_bits
    kernels = np.asarray(jaxft.materialize(params["layers"]["mlp"]["down_proj"]["kernel"]))
    arrays = {name: x for name, x in stored(folder).items() if "down_proj" not in name}
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(len(kernels))]
    store(folder, arrays | {name: x.T.copy() for name, x in zip(names, kernels, strict=True)})
    own = settings_of(folder) | {SKIP: ["head", "down_proj"]}
    edit(folder / "config.json", quantization_config=own)
    model, read = load(folder)
    save(model, read, tmp_path / "again", like=folder)
    assert settings_of(tmp_path / "again")[SKIP] == ["head", "down_proj"]


def test_what_is_made_dense_stays_dense(four_bits, tmp_path):
    folder, params = four_bits
    model, _ = load(folder)
    save(
        model,
        jax.tree.map(jaxft.materialize, params, is_leaf=is_weight),
        tmp_path / "dense",
        like=folder,
    )
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("window", [None, 0])
def test_a_gemma2_without_sliding_layers_has_the_window_that_transformers_asks_for(
    copy_of, edit, tmp_path, window
):
    folder = copy_of("models/gemma2")
    edit(folder / "config.json", sliding_window=window)
    model, params = load(folder)
    for like in (None, folder):
        save(model, params, tmp_path / str(like is None), like=like)
        written = json.loads((tmp_path / str(like is None) / "config.json").read_text())
        assert written["sliding_window"] == 4096
        assert set(written["layer_types"]) == {"full_attention"}
