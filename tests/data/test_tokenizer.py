from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from jaxft.data import load_tokenizer
from jaxft.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def edit(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def bare(tmp_path):
    """A folder with tokenizer.json alone, whose only special token is GPT-2's."""
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["some text"] * 3, 270, special_tokens=["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_those_of_transformers(tokenizer):
    encodings = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))["encodings"]
    undoubled = {text: ids for text, ids in encodings.items() if not text.startswith("<s>")}
    assert {text: tokenizer.encode(text) for text in undoubled} == undoubled


def test_a_bos_that_the_text_begins_with_is_not_doubled(tokenizer):
    assert tokenizer.encode("<s>Aromi") == tokenizer.encode("Aromi")
    assert tokenizer.encode("<s>Aromi", add_special_tokens=False) == tokenizer.encode("Aromi")
    assert tokenizer.encode("<s><s>") == [0, 0]


def test_decoding_gives_the_text_back(tokenizer):
    text = "Grüße 🦊 <|im_start|> 4\n"
    assert tokenizer.decode(tokenizer.encode(text, False), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == "Grüße 🦊  4\n"


def test_special_ids_and_every_id_that_ends_a_generation(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 4, 2)
    assert tokenizer.eos_ids == (4, 1)
    assert tokenizer.vocabulary_size == tokenizer.backend.get_vocab_size()


def test_tokenizer_json_alone_is_enough(bare):
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (0,), 0)
    assert tokenizer.encode("text")[:1] != [0]
    assert tokenizer.chat_template is None


def test_added_tokens_of_the_model_config_stand_in_for_names_that_are_missing(folder):
    edit(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    edit(folder / "generation_config.json", bos_token_id=None, eos_token_id=[7, 1, 10**6])
    edit(folder / "config.json", bos_token_id=3, eos_token_id=None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 1, 1)
    assert tokenizer.eos_ids == (1, 7)
    assert tokenizer.eos_text == "</s>"
    assert "eos_token" not in tokenizer.special_tokens, "a template writes nothing for it"


def test_ids_that_llamas_config_has_by_default_are_not_taken_for_letters(bare):
    edit(bare / "config.json", bos_token_id=1, eos_token_id=2)
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    assert tokenizer.eos_ids == (0, 2), "transformers' generate stops at 2 as well"


def test_pad_falls_back_to_eos(folder):
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(folder).pad_id == load_tokenizer(folder).eos_id == 4


def test_special_tokens_map_goes_before_a_config_without_added_tokens(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "special_tokens_map.json", eos_token={"content": "</s>"}, bos_token="<pad>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((1, 4), 2)
    edit(folder / "tokenizer_config.json", added_tokens_decoder={})
    assert load_tokenizer(folder).bos_id == 0


def test_a_named_token_that_the_vocabulary_lacks_is_added(folder):
    edit(folder / "tokenizer_config.json", eos_token="<|end|>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.vocabulary_size - 1
    assert tokenizer.encode("a<|end|>")[-1] == tokenizer.eos_id


def test_truncation_and_padding_of_the_file_are_not_used(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    original = load_tokenizer(GOLDEN / "tokenizer")
    assert load_tokenizer(folder).encode("Aromi is 4.") == original.encode("Aromi is 4.")


def test_chat_template_of_a_file_a_name_or_a_path(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    edit(folder / "tokenizer_config.json", chat_template=several)
    (tmp_path / "own.jinja").write_text("C")
    assert load_tokenizer(folder).chat_template == "A"
    assert load_tokenizer(folder, "tools").chat_template == "B"
    assert load_tokenizer(folder, str(tmp_path / "own.jinja")).chat_template == "C"
    with pytest.raises(
        UserError, match=r"'tool'.*default, tools, or of jaxft: chatml.*\(nearest: 'tools'\)"
    ):
        load_tokenizer(folder, "tool")
    (folder / "chat_template.jinja").write_text("D")
    assert load_tokenizer(folder).chat_template == "D"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"", "not a tokenizer"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\x00\xff garbage", "not a tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "not a tokenizer"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "not a tokenizer that"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"[1]", "an object is expected, not list"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder"),
        ("generation_config.json", b'{"eos_token_id": "4"}', "eos_token_id must be an integer"),
        ("config.json", b"\xff", "config.json: not JSON"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_clear_line(folder, file, content, message):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_panic_of_the_library_is_one_clear_line(folder):
    """A post-processor that names a token it does not hold: the Rust side panics when it is used."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<none>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a tokenizer") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
