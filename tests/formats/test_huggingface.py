"""jaxft.formats.huggingface: folders that transformers wrote, read and written back."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load, save, writing
from jaxft.formats.config_file import config_json, model_config

MODELS = sorted(path.name for path in (Path(__file__).parent.parent / "golden/models").iterdir())
FAMILIES = ["gemma2", "gpt2", "llama_bias", "qwen2"]


def tensors(folder):
    return {
        name: array
        for file in folder.glob("*.safetensors")
        for name, array in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(golden, model_of, logits_of, deviation, name):
    """Without padding, with padding on either side, and with two rows packed into one."""
    model, params = model_of(name)
    expected = np.load(golden / "models" / name / "expected.npz")
    for side in ("", "left_", "right_"):
        mask = expected[f"{side}attention_mask"]
        logits = logits_of(model, params, expected[f"{side}input_ids"], mask)
        assert deviation(logits, expected[f"{side}logits"], mask) < 1e-4, side
    rows, half = expected["input_ids"], expected["input_ids"].shape[1] // 2
    packed = np.concatenate([rows[:, :half], np.roll(rows, 1, axis=0)[:, :half]], axis=1)
    segments = np.broadcast_to(np.repeat([3, 1], half), packed.shape)
    first, second = np.split(logits_of(model, params, packed, segments), 2, axis=1)
    assert deviation(first, expected["logits"][:, :half]) < 1e-4
    assert deviation(second, np.roll(expected["logits"], 1, axis=0)[:, :half]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_is_written_back_byte_for_byte(golden, model_of, tmp_path, name):
    model, params = model_of(name)
    source = golden / "models" / name
    save(model, params, tmp_path / "out", like=source)
    for file in source.glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    read, written = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert read == written


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_written_that_says_the_same(golden, tmp_path, name):
    config = model_config(golden / "models" / name)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    scaling = dict(config.rope_scaling)
    if "type" in scaling:  # an old spelling
        scaling["rope_type"] = scaling.pop("type")
    written = model_config(tmp_path)
    assert dict(written.rope_scaling) == scaling
    assert dataclasses.replace(written, rope_scaling=config.rope_scaling) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_source_a_whole_folder_is_written(model_of, tmp_path, name):
    model, params = model_of(name)
    save(model, params, tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, read = load(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_computation_and_the_parameters_take_the_dtypes_asked_for(golden):
    model, params = load(golden / "models/llama", dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    model, params = load(golden / "models/llama", dtype="bfloat16", param_dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_bfloat16_folder_is_written_back_byte_for_byte(golden, tmp_path):
    model, params = load(golden / "models/llama_bias", dtype="bfloat16")
    save(model, params, tmp_path / "a", like=golden / "models/llama_bias")
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    model, params = load(tmp_path / "a", dtype="bfloat16")
    save(model, params, tmp_path / "b", like=tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_each_device_gets_its_shard(golden, model_of):
    _, whole = model_of("llama_bias")
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])

    def shardings(path, shape):
        split = ("fsdp", "tensor") if path.endswith("kernel") else ()
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - len(split)), *split))

    _, params = load(golden / "models/llama_bias", shardings=shardings)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 20)}
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_files_of_the_model_without_its_head_are_read(copy_of, model_of, tmp_path):
    """Old files have no prefix and hold buffers; written back they keep their names."""
    folder = copy_of("models/gpt2")
    old = {name.removeprefix("transformer."): array for name, array in tensors(folder).items()}
    buffers = {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    safetensors.numpy.save_file(old | buffers, folder / "model.safetensors", {"format": "pt"})
    model, params = load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, model_of("gpt2")[1])
    save(model, params, tmp_path / "out", like=folder)
    assert tensors(tmp_path / "out").keys() == old.keys()


def test_a_tied_model_may_store_its_head_and_a_different_one_is_untied(copy_of, tmp_path, capsys):
    folder = copy_of("models/qwen2")
    stored = tensors(folder)
    head = {"lm_head.weight": stored["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(stored | head, folder / "model.safetensors", {"format": "pt"})
    model, params = load(folder)
    assert model.config.tied
    assert not capsys.readouterr().err
    save(model, params, tmp_path / "out", like=folder)
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()
    head = {"lm_head.weight": 2 * stored["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(stored | head, folder / "model.safetensors", {"format": "pt"})
    model, params = load(folder)
    assert not model.config.tied
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    np.testing.assert_array_equal(params["head"]["kernel"], head["lm_head.weight"].T)


def test_a_head_that_became_its_own_is_written_as_one(golden, model_of, tmp_path):
    model, params = model_of("qwen2")
    head = jnp.ones((model.config.hidden, model.config.vocabulary))
    source = golden / "models/qwen2"
    save(model, params | {"head": {"kernel": head}}, tmp_path / "out", like=source)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    model, params = load(tmp_path / "out")
    np.testing.assert_array_equal(params["head"]["kernel"], head)


def test_unknown_keys_of_the_config_and_the_tokenizer_go_along(copy_of, edit, tmp_path):
    folder = copy_of("models/llama")
    edit(folder / "config.json", own_key=[1])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    model, params = load(folder)
    save(model, params, tmp_path / "out", like=folder)
    assert json.loads((tmp_path / "out/config.json").read_text())["own_key"] == [1]
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {file.name for file in folder.iterdir()} - {"expected.npz"} | {
        "manifest.json"
    }


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _stored(**changes):
    """Changes tensors; None takes one out."""

    def change(folder):
        changed = {key: x for key, x in (tensors(folder) | changes).items() if x is not None}
        safetensors.numpy.save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return change


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BAD: dict = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json; there"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "json: not JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "an object is expected"),
    "pickle": (_pickled, "pytorch_model.bin is a pickle"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "missing": (_stored(**{NORM: None}), f"the tensor {NORM} is missing"),
    "unused": (
        _stored(**{"model.layers.1.mlp.up_prj.weight": np.ones(3, np.float32)}),
        f"up_prj.weight is not used by this model .nearest: '{UP}'",
    ),
    "shape": (_stored(**{UP: np.ones((3, 4), np.float32)}), "has shape .3, 4., .* needs .40, 32."),
    "integers": (_stored(**{NORM: np.ones(32, np.int32)}), f"{NORM} is I32"),
}
BAD_CONFIG = {
    "unknown": ({"model_type": "lama"}, "unknown architecture 'lama' .nearest: 'llama'.*qwen2"),
    "no type": ({"model_type": ...}, "json: no model_type, which names the architecture"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map asks for code .* never runs"),
    "trusted": ({"trust_remote_code": True}, "trust_remote_code asks for code"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "no size": ({"hidden_size": ...}, "config.json: no 'hidden_size'"),
    "kind": ({"hidden_size": "x", "head_dim": ...}, "json: hidden_size takes a number, not 'x'"),
    "size": ({"vocab_size": "96"}, "config.json: '96' is no number for vocabulary"),
    "nan": ({"rms_norm_eps": float("nan")}, "nan is no number for norm_epsilon"),
    "infinite": (
        {"rope_parameters": {"rope_theta": float("inf")}},
        "inf is no number for rope_theta",
    ),
    "vast": ({"vocab_size": 2**62}, "is no number for vocabulary"),
    "layers": ({"num_hidden_layers": 10**12}, "is no number for layers"),
    "fewer layers": (
        {"num_hidden_layers": 1},
        "config.json says 1 layer, and there are tensors of ",
    ),
    "more layers": (
        {"num_hidden_layers": 9},
        "config.json says 9 layers, and there are tensors of ",
    ),
    "kinds": (
        {"layer_types": ["full_attention"]},
        "layer_types has 1 layer, and num_hidden_layers is ",
    ),
    "other kinds": (
        {"layer_types": ["linear_attention"]},
        "unknown kind 'linear_attention'; jaxft knows sliding_attention and full_attention",
    ),
    "digits": ({"hidden_size": 10**400}, "a number of many digits is no number for hidden"),
    "list type": ({"model_type": ["llama"]}, "unknown architecture .'llama'."),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "json: the rope settings give frequencies that are no numbers",
    ),
    "rope list": (
        {"rope_parameters": {"rope_type": "linear", "factor": [1]}},
        "json: rope_scaling: factor takes a number or a text, not .1",
    ),
    "rope kind": (
        {"rope_parameters": {"rope_type": "spiral", "long_factor": [1.0], "rope_theta": 1e4}},
        "json: unknown rope scaling 'spiral': known are default, linear",
    ),
    "two ropes": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "say different things"),
    "odd": ({"head_dim": 7}, "json: head_dim 7 is odd, and rotary features pair"),
    "heads": ({"num_key_value_heads": 3}, "4 heads do not divide among 3 key heads"),
}


def test_an_adapter_is_no_model_and_one_beside_a_model_is_not_put_on(copy_of, capsys):
    folder = copy_of("models/llama")
    (folder / "adapter_config.json").write_text("{}")
    load(folder)
    assert "holds an adapter beside the model" in capsys.readouterr().err
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"is an adapter .* name its base as the model"):
        load(folder)


def test_the_file_that_config_json_names_is_the_one_that_is_read(copy_of, edit):
    folder = copy_of("models/llama")
    edit(folder / "config.json", transformers_weights="model.safetensors")
    load(folder)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"transformers_weights names .other"):
        load(folder)


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_one_clear_line(copy_of, spoil, message):
    folder = copy_of("models/llama")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIG.values(), ids=BAD_CONFIG.keys())
def test_a_bad_config_is_one_clear_line(copy_of, edit, changes, message):
    folder = copy_of("models/llama")
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_no_folder_and_no_such_dtype(golden, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"dtype .bfloat. is not known .nearest: .bfloat16."):
        load(golden / "models/llama", dtype="bfloat")


def test_nothing_is_overwritten_and_adapters_are_not_lost(model_of, tmp_path):
    model, params = model_of("llama")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty; jaxft overwrites nothing"):
        save(model, params, tmp_path)
    adapted = jaxft.adapt(params, jaxft.methods.lora(rank=2), jax.random.key(0))
    with pytest.raises(UserError, match=r"holds an adapter \(LoRA\): call jaxft.merge"):
        save(model, adapted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


MEASURE = """
import sys, jax, jax.numpy as jnp
from jaxft.formats import load
from jaxft.tree import size_bytes

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

jnp.ones(3).block_until_ready()
before = peak()
model, params = load(sys.argv[1], dtype=sys.argv[2])
print(peak() - before, size_bytes(params))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_model_and_its_largest_tensor(tmp_path_factory, dtype):
    folder, largest = _large_model(tmp_path_factory)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True
    )
    grown, model = map(int, ran.stdout.split())
    assert grown < 1.1 * (model + largest)


def _large_model(factory):
    """A folder of about 200 MB, and the bytes of its largest tensor."""
    from jaxft.models.config import Config
    from jaxft.models.transformer import Transformer, initial_params

    folder = factory.getbasetemp() / "large"
    config = Config("llama", 8000, 1024, 2048, 4, 8, 8, 128, 64)
    if not folder.exists():
        shapes = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
        save(Transformer(config), params, folder, shard_bytes=50_000_000)
    return folder, 8000 * 1024 * 4


@pytest.mark.reference
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_was_written(golden, model_of, deviation, tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = model_of(name)
    save(model, params, tmp_path / "out")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    read, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(found.values())
    expected = np.load(golden / "models" / name / "expected.npz")
    with torch.no_grad():
        logits = read(torch.from_numpy(expected["input_ids"].astype(np.int64))).logits.numpy()
    assert deviation(logits, expected["logits"]) < 1e-4


def test_what_a_hostile_folder_links_to_is_not_copied_along(copy_of, tmp_path, capsys):
    folder = copy_of("models/llama")
    (tmp_path / "secret").write_text("mine")
    (folder / "tokenizer_secret.json").symlink_to(tmp_path / "secret")
    (folder / "tokenizer.json").write_text("{}")
    model, params = load(folder)
    save(model, params, tmp_path / "out", like=folder)
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/tokenizer_secret.json").exists()
    assert (
        "tokenizer_secret.json is a link out of its folder: not copied" in capsys.readouterr().err
    )


def test_of_shards_one_tensor_at_a_time_is_on_the_host(golden, tmp_path, monkeypatch):
    """What is written from a mesh is what is written from one device, and never stands whole in the host's memory."""
    folder = golden / "models/llama_bias"
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])

    def shardings(path, shape):
        axes = [None] * len(shape)
        if path.endswith("kernel"):
            axes[-2] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*axes))

    model, params = load(folder, shardings=shardings)
    taken, most = [], 0

    def counted(array):
        nonlocal most
        host = np.array(array)
        taken.append(weakref.ref(host))
        alive = [held for held in (one() for one in taken) if held is not None]
        most = max(most, sum(held.nbytes for held in alive))
        return host

    monkeypatch.setattr(writing, "to_host", counted)
    save(model, params, tmp_path / "shards", like=folder)
    written = tensors(tmp_path / "shards")
    sizes = sorted((array.nbytes for array in written.values()), reverse=True)
    assert most <= sum(sizes[:2]) < sum(sizes) / 3
    for name, array in tensors(folder).items():
        np.testing.assert_array_equal(written[name], array)
