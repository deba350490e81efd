"""`jaxft export`: llama.cpp's file of a model or an adapter, as llama.cpp's converter would write it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxft.cli import main
from jaxft.data.tokenizer import load_tokenizer
from jaxft.errors import UserError
from jaxft.formats import load
from jaxft.formats.gguf.header import read_header
from jaxft.formats.gguf.modelfile import go_template
from jaxft.formats.gguf.reading import import_gguf
from jaxft.formats.gguf.writing import export_gguf
from jaxft.formats.safetensors import Lazy, open_folder, write_file

GOLDEN = Path(__file__).parent.parent / "golden"
IN_FLOAT32 = ("llama3", "qwen3", "gemma2", "gemma3", "gpt2")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`folder = imported("llama")`: a golden file's folder, made once."""
    made = tmp_path_factory.mktemp("gguf")
    return functools.cache(lambda name: import_gguf(GOLDEN / "gguf" / f"{name}.gguf", made / name))


@pytest.fixture(scope="module")
def base(imported, tmp_path_factory):
    """The golden llama, which PEFT's golden adapters are of, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(GOLDEN / "models" / "llama", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(imported("llama") / name, folder / name)
    return folder


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {name: one.read() for name, one in read_header(file).tensors.items()}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_file_is_written_as_llama_cpps_converter_writes_it(name, imported, tmp_path):
    """Tensor by tensor the golden file, which this code did not write; and every key of it with the same value."""
    file = export_gguf(imported(name), tmp_path / "a.gguf", kind="f32")
    ours, theirs = read_header(file), read_header(GOLDEN / "gguf" / f"{name}.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for tensor, expected in tensors_of(theirs.file).items():
        found = ours.tensors[tensor].read()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=tensor)
    for key, value in theirs.metadata.items():
        if key not in ("general.name", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            assert ours.metadata[key] == value, key


def test_what_is_read_back_says_the_same(base, logits_of, deviation, tmp_path):
    """As transformers says it of the folder."""
    file = export_gguf(base, tmp_path / "a.gguf", kind="f32")
    expected = np.load(GOLDEN / "models" / "llama" / "expected.npz")
    model, params = load(import_gguf(file, tmp_path / "back"))
    assert deviation(logits_of(model, params, expected["input_ids"]), expected["logits"]) < 1e-5


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_kernels_are_packed_and_the_rest_is_float32(kind, base, tmp_path):
    """As the package packs them; in q8_0, rows of 40 numbers are no whole number of blocks, and stay float16."""
    plain = tensors_of(export_gguf(base, tmp_path / "a.gguf", kind="f32"))
    packed = read_header(export_gguf(base, tmp_path / "b.gguf", kind=kind))
    kinds = {name: one.kind.name for name, one in packed.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    for name, one in packed.tensors.items():
        expected = gguf.dequantize(gguf.quantize(plain[name], one.kind), one.kind)
        np.testing.assert_array_equal(np.asarray(one.read(), np.float32), expected, err_msg=name)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "gemma2", "gpt2"])
def test_ids_are_those_of_the_folder(name, imported, tmp_path):
    texts = json.loads((GOLDEN / "gguf" / "tokens.json").read_text())["texts"]
    file = export_gguf(imported(name), tmp_path / "a.gguf")
    ours, theirs = (
        load_tokenizer(folder) for folder in (import_gguf(file, tmp_path / "back"), imported(name))
    )
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (
        theirs.bos_id,
        theirs.eos_ids,
        theirs.chat_template,
    )


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "vera", "patterns_rsdora", "save_head"])
def test_a_merged_model_says_what_peft_says(name, base, model_of, logits_of, deviation, tmp_path):
    adapter = GOLDEN / "adapters" / name
    file = export_gguf(base, tmp_path / "a.gguf", adapter, kind="f32", merged=True)
    expected = np.load(adapter / "expected.npz")
    model, params = load(import_gguf(file, tmp_path / "back"))
    assert deviation(logits_of(model, params, expected["input_ids"]), expected["logits"]) < 1e-4


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "layers"])
def test_an_adapter_alone_adds_what_merging_adds(name, base, tmp_path):
    """As llama.cpp computes it: W + alpha / rank b a, whatever the adapter's own scale was, module by module."""
    adapter = GOLDEN / "adapters" / name
    alone = read_header(export_gguf(base, tmp_path / "a.gguf", adapter))
    plain = tensors_of(export_gguf(base, tmp_path / "b.gguf", kind="f32"))
    merged = tensors_of(export_gguf(base, tmp_path / "m.gguf", adapter, kind="f32", merged=True))
    assert alone.metadata["general.type"] == "adapter"
    alpha = alone.metadata["adapter.lora.alpha"]
    parts = {key: one.read() for key, one in alone.tensors.items()}
    adapted = {key.removesuffix(".lora_a") for key in parts if key.endswith(".lora_a")}
    assert adapted
    for key, kernel in plain.items():
        if key in adapted:
            a, b = parts[f"{key}.lora_a"], parts[f"{key}.lora_b"]
            assert a.shape[0] == b.shape[1]
            kernel = kernel + alpha / a.shape[0] * b @ a
            assert not np.allclose(kernel, plain[key])
        np.testing.assert_allclose(merged[key], kernel, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["dora", "vera", "save_head", "embedding", "save_norm"])
def test_what_no_adapters_file_holds_is_refused(name, base, tmp_path):
    """By name, with what writes it."""
    with pytest.raises(UserError, match="--merge writes the whole model"):
        export_gguf(base, tmp_path / "a.gguf", GOLDEN / "adapters" / name)
    assert not list(tmp_path.iterdir())


def test_a_shape_that_llama_cpp_cannot_say_is_refused(imported, edit, tmp_path):
    """What would be read as another model: here queries that are scaled otherwise."""
    folder = tmp_path / "model"
    shutil.copytree(imported("gemma2"), folder)
    (folder / "manifest.json").unlink()
    edit(folder / "config.json", query_pre_attn_scalar=20)
    with pytest.raises(UserError, match=r"files of gemma2 cannot say: query_scale 0\.223"):
        export_gguf(folder, tmp_path / "a.gguf")


def test_a_tokenizer_that_cuts_in_another_way_is_refused(imported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(imported("gpt2"), folder)
    (folder / "manifest.json").unlink()
    words = json.loads((folder / "tokenizer.json").read_text())
    words["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="none of the ways in which llama"):
        export_gguf(folder, tmp_path / "a.gguf")


def test_nothing_is_overwritten(base, tmp_path):
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(UserError, match="stands there"):
        export_gguf(base, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"
    with pytest.raises(UserError, match="no such folder"):
        export_gguf(base, tmp_path / "none" / "a.gguf")


@pytest.fixture
def talking(imported, tmp_path):
    """`tokenizer = talking(template)`: the golden qwen2's, with another chat template."""

    def make(template: str):
        (tmp_path / "t.jinja").write_text(template)
        return load_tokenizer(imported("qwen2"), str(tmp_path / "t.jinja"))

    return make


def test_a_template_of_fixed_texts_becomes_gos(talking):
    """A default system message stands before a first question alone."""
    plain = go_template(talking(CHATML))
    assert plain == (
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}<|im_start|>system\n{{ $m.Content }}<|im_end|>\n'
        '<|im_start|>user\n{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n{{ end }}{{ $m.Content }}'
        '<|im_end|>\n<|im_start|>assistant\n{{ else if eq $m.Role "assistant" }}{{ $m.Content }}<|im_end|>\n'
        "<|im_start|>user\n{{ end }}{{ end }}"
    )
    default = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    )
    assert "{{ if eq $i 0 }}<|im_start|>system\nBe kind" in go_template(talking(default + CHATML))


def test_another_template_is_left_to_the_file(talking):
    """One that writes earlier answers otherwise, that refuses a system message, or that there is none of."""
    cut = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:1] }}"
    )
    assert go_template(talking(cut)) is None
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert go_template(talking(refusing + CHATML)) is None


def test_the_modelfile_stands_beside_the_file(imported, tmp_path, capsys):
    """FROM, stop tokens and the parameters of generation_config.json; of an adapter, ADAPTER."""
    folder = tmp_path / "model"
    shutil.copytree(imported("qwen2"), folder)
    (folder / "manifest.json").unlink()
    (folder / "chat_template.jinja").write_text(CHATML)
    settings = {"eos_token_id": [2, 4], "temperature": 0.6, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    arguments = ["--model", str(folder), "--output", str(tmp_path / "a.gguf"), "--format", "gguf"]
    assert main(["export", *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.gguf'}\n"
    text = (tmp_path / "a.gguf.Modelfile").read_text()
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """{{ range')
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert text.endswith("PARAMETER temperature 0.6\nPARAMETER repeat_penalty 1.1\n")


def test_an_adapters_modelfile_names_the_base(base, tmp_path):
    export_gguf(base, tmp_path / "a.gguf", GOLDEN / "adapters" / "lora")
    lines = (tmp_path / "a.gguf.Modelfile").read_text().splitlines()
    assert lines[:3] == [
        f"# The base in GGUF: jaxft export --model {base} --format gguf --output base.gguf",
        "FROM ./base.gguf",
        "ADAPTER ./a.gguf",
    ]


def test_numbers_beyond_float16_are_refused(base, tmp_path):
    """And nothing half written is left."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    stored = open_folder(folder)
    arrays = {name: np.array(one.read()) for name, one in stored.items()}
    arrays["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    write_file(
        folder / "model.safetensors",
        {n: Lazy(a.shape, a.dtype, functools.partial(np.asarray, a)) for n, a in arrays.items()},
    )
    with pytest.raises(UserError, match="beyond float16: --type f32"):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_package_reads_what_was_written(base, tmp_path):
    """By its own reader, which checks what llama.cpp's does."""
    reader = gguf.GGUFReader(export_gguf(base, tmp_path / "a.gguf", kind="q8_0"))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert len(reader.tensors) == len(read_header(tmp_path / "a.gguf").tensors)
