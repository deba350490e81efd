"""Recipes, overrides, and a written configuration."""

import json
import random
import string

import pytest
from ml_collections import ConfigDict

from jaxft.configuration import difference, flatten, from_json, load_config, to_json, validate
from jaxft.configuration.keys import unknown
from jaxft.errors import UserError
from jaxft.methods import METHODS, defaults

RECIPE = "configs/sft.py:lora"
KEYS = list(flatten(load_config(RECIPE)))


def fails(source, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_valid_recipe_with_its_rows_defaults(method):
    config = load_config(f"configs/sft.py:{method}")
    validate(config)
    section = {key: value for key, value in config.method.items() if key != "name"}
    assert config.method.name == method
    assert section == defaults(method)


def test_without_an_argument_the_recipe_takes_its_own():
    assert load_config("configs/sft.py") == load_config(RECIPE)


def test_recipes_are_found_from_any_folder_and_a_local_one_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(RECIPE).seed == 42
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sft.py").write_text(
        "from jaxft.configuration.recipes import PACKAGE, run\n"
        "def get_config(method='lora'):\n"
        "    config = run(PACKAGE.parent / 'configs/sft.py', method)\n"
        "    config.seed = 7\n"
        "    return config\n"
    )
    assert load_config("configs/sft.py:dora", ["--config.seed=8"]).seed == 8


def test_a_recipe_may_build_on_another(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from jaxft.configuration import load_config\n"
        "def get_config(method='dora'):\n"
        "    config = load_config('configs/sft.py:' + method)\n"
        "    config.method.rank_pattern = {'z': 1, 'a': 2}\n"
        "    config.optimizer.learning_rate = 1\n"
        "    return config\n"
    )
    config = load_config(str(recipe))
    assert config.method.name == "dora"
    assert list(config.method.rank_pattern.items()) == [("z", 1), ("a", 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]


@pytest.mark.parametrize("words", [["--config.steps=1e3"], ["--config.steps", "1_000"]])
def test_both_ways_to_write_an_override(words):
    assert load_config(RECIPE, words).steps == 1000


def test_a_negative_value_may_stand_apart():
    assert (
        load_config(RECIPE, ["--config.mesh.data", "1", "--config.mesh.fsdp", "-1"]).mesh.fsdp == -1
    )


def test_overrides_as_a_mapping_of_keys_or_sections():
    given = {"method.rank": 4, "config.steps": "1e2", "optimizer": {"b1": 0, "name": "adam"}}
    config = load_config(RECIPE, given)
    assert (config.method.rank, config.steps) == (4, 100)
    assert (config.optimizer.b1, config.optimizer.name) == (0.0, "adam")


def test_the_last_override_wins():
    assert load_config(RECIPE, ["--config.seed=1", "--config.seed=2"]).seed == 2


def test_a_dict_is_set_whole_or_by_its_keys():
    words = [
        "--config.method.rank_pattern={'q_proj': 8}",
        r"--config.method.rank_pattern.layers\.0=4",
    ]
    assert load_config(RECIPE, words).method.rank_pattern == {"q_proj": 8, r"layers\.0": 4}
    words = ["--config.optimizer.name=sgd", "--config.optimizer.options.momentum=0.9"]
    assert load_config(RECIPE, words).optimizer.options == {"momentum": 0.9}


def test_an_override_of_the_methods_name_asks_the_recipe_for_it():
    assert load_config(RECIPE, ["--config.method.name=vera"]) == load_config("configs/sft.py:vera")


def test_every_key_can_be_set_to_what_it_is():
    config = load_config(RECIPE)
    for key, value in flatten(config).items():
        text = value if isinstance(value, str) else repr(value)
        assert load_config(RECIPE, [f"--config.{key}={text}"]) == config, key
        assert load_config(RECIPE, [f"--config.{key}={json.dumps(value)}"]) == config, key


def misspellings(key, draw):
    """A letter dropped, doubled, changed, put in, or swapped with the next: each at two places."""
    for _ in range(2):
        place = draw.randrange(len(key) - 1)
        before, letter, after = key[:place], key[place], key[place + 1 :]
        other = draw.choice(string.ascii_lowercase)
        yield from (before + after, before + letter * 2 + after, before + other + after)
        yield from (before + other + letter + after, before + after[0] + letter + after[1:])


def test_a_key_misspelled_by_a_letter_names_the_right_one():
    """Each key of each recipe."""
    keys = {key for method in METHODS for key in flatten(load_config(f"configs/sft.py:{method}"))}
    draw = random.Random(0)
    for key in sorted(keys):
        for wrong in set(misspellings(key, draw)) - keys:
            assert f"config.{key}" in _named(unknown(wrong, keys)), wrong


def _named(message):
    return message.partition("(nearest: ")[2].removesuffix(")").split(", ")


def test_keys_that_differ_by_a_letter_are_all_named():
    for letter in string.ascii_lowercase + string.digits:
        if letter not in "12":
            named = _named(unknown(f"optimizer.b{letter}", KEYS))
            assert {"config.optimizer.b1", "config.optimizer.b2"} <= set(named)


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("--config.metod.rank=8", "config.method.rank"),
        ("--config.learning_rate=1", "config.optimizer.learning_rate"),
        ("--config.data.batch_size=1", "config.batch_size"),
        ("--config.method.rank.q_proj=8", "config.method.rank"),
        ("--config.=8", "config."),
        ("--config.method=dora", "config.method is a section; set one of its keys: method."),
        ("--config.steps", "--config.steps needs a value"),
        ("--config.steps=many", "config.steps takes a whole number, not 'many'"),
        ("--config.method.name=lroa", "'lora'"),
        ("--batch=3", "'--batch=3' is no override"),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(word, right):
    assert right in fails(RECIPE, word)


def test_unknown_key_of_a_method_that_has_it_not():
    assert "no key config.method.rank" in fails("configs/sft.py:full", "--config.method.rank=8")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("configs/stf.py:lora", "'configs/sft.py'"),
        ("configs/sft", "'configs/sft.py'"),
        ("configs/sft.py:lroa", "'lora'"),
        ("nowhere/config.json", "no such file"),
    ],
)
def test_a_wrong_source_names_the_nearest(source, says):
    assert says in fails(source)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_confg(): pass", "has no function get_config (nearest: 'get_confg')"),
        ("def get_config(): return 3", "returns a int, not a ConfigDict"),
        ("def get_config(:", "recipe.py:1: SyntaxError"),
        ("\nimport nothing_of_the_kind", "recipe.py:2: ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0", "recipe.py:2: ZeroDivisionError"),
        (
            "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})",
            "config.method.name is missing",
        ),
    ],
)
def test_a_broken_recipe_says_where(tmp_path, text, says):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(text)
    assert says in fails(str(recipe))


def test_a_recipe_without_parameters_takes_no_argument(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config(): pass")
    assert "takes no argument, not 'lora'" in fails(f"{recipe}:lora")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_runs_again(tmp_path, method):
    words = ["--config.report_to=wandb", "--config.mesh.data=2", "--config.optimizer.options={}"]
    config = load_config(f"configs/sft.py:{method}", words)
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert load_config(str(path)) == config == from_json(to_json(config))
    assert load_config(str(path), ["--config.seed=9"]).seed == 9
    assert difference(config, load_config(str(path))) == []


def test_writing_keeps_dicts_tuples_and_their_order():
    words = ['--config.method.rank_pattern={"z": 1, "a.b": 2}', "--config.method.targets=q_proj"]
    config = from_json(to_json(load_config(RECIPE, words)))
    assert list(config.method.rank_pattern.items()) == [("z", 1), ("a.b", 2)]
    assert type(config.method.rank_pattern) is dict
    assert config.method.targets == ("q_proj",)
    assert config.optimizer.decay[0] == ("bias", False)


def test_a_written_configuration_that_is_broken_says_where(tmp_path):
    path = tmp_path / "config.json"
    whole = json.loads(to_json(load_config(RECIPE)))

    def says(written):
        path.write_text(written if isinstance(written, str) else json.dumps(written))
        return fails(str(path))

    assert "config.json:2: not JSON" in says('{"seed": 1,\n')
    assert "not a configuration" in says("[]")
    assert "no key config.sead (nearest: config.seed" in says(whole | {"sead": 1})
    assert "config.seed: missing" in says({key: whole[key] for key in whole if key != "seed"})
    assert "config.seed takes a whole number, not None" in says(whole | {"seed": None})
    assert "takes a number, not 'x'" in says(whole | {"epochs": "x"})
    path.write_text(json.dumps(whole))
    assert "takes no argument" in fails(f"{path}:lora")
    assert "is of a run with 'lora'" in fails(str(path), "--config.method.name=dora")


def test_the_difference_of_two_configurations_is_a_line_a_key():
    old, new = load_config(RECIPE), load_config("configs/sft.py:vera", ["--config.steps=3"])
    lines = difference(old, new)
    assert "steps: 0 -> 3" in lines
    assert "method.name: 'lora' -> 'vera'" in lines
    assert "method.alpha: 32.0 -> (absent)" in lines
    assert not any(line.startswith("seed") for line in lines)


def test_a_configuration_takes_no_new_key():
    config = load_config(RECIPE)
    with pytest.raises(AttributeError):
        config.batch_siz = 4
    loose = ConfigDict(config.to_dict())
    loose.batch_siz = 4
    with pytest.raises(UserError, match=r"no key config.batch_siz \(nearest: config.batch_size"):
        validate(loose)


@pytest.mark.parametrize("none", ["none", "None", "null", " NONE "])
def test_none_empties_the_keys_that_may_be_empty(none):
    emptied = {
        "adapter": "",
        "tokenizer": "",
        "data.eval": "",
        "data.max_length": 0,
        "steps": 0,
        "optimizer.clip_norm": 0.0,
        "checkpoint.every": 0,
        "report_to": (),
        "method.targets": (),
        "method.rank_pattern": {},
        "optimizer.options": {},
    }
    words = ["--config.report_to=wandb", "--config.adapter=a", "--config.optimizer.clip_norm=3"]
    flat = flatten(load_config(RECIPE, [*words, *(f"--config.{key}={none}" for key in emptied)]))
    assert {key: flat[key] for key in emptied} == emptied
    assert load_config(RECIPE, dict.fromkeys(emptied)) == load_config(
        RECIPE, [f"--config.{key}={none}" for key in emptied]
    )


def test_none_is_refused_or_a_word_like_any_other_where_a_key_is_never_empty():
    assert load_config(RECIPE, ["--config.remat=none"]).remat == "none"
    assert "config.batch_size takes a whole number, not 'none'" in fails(
        RECIPE, "--config.batch_size=none"
    )
    assert "config.method.rank takes a whole number" in fails(RECIPE, "--config.method.rank=None")


def test_a_section_is_set_by_a_mapping():
    words = ["--config.optimizer={'learning_rate': 1e-3, 'options': {}, 'warmup_steps': '1e2'}"]
    config = load_config(RECIPE, [*words, '--config.mesh={"fsdp": 2}'])
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1e-3, 100)
    assert (config.mesh.fsdp, config.mesh.data) == (2, -1)
    assert "no key config.mesh.fsdb (nearest: config.mesh.fsdp" in fails(
        RECIPE, "--config.mesh={'fsdb': 2}"
    )


def test_whole_numbers_in_a_mapping_may_be_written_like_any():
    words = [
        "--config.method.rank_pattern={'q_proj': 1e1}",
        "--config.method.rank_pattern.o_proj=4.0",
    ]
    assert load_config(RECIPE, words).method.rank_pattern == {"q_proj": 10, "o_proj": 4}
    assert "config.method.rank_pattern takes a mapping" in fails(
        RECIPE, "--config.method.rank_pattern.q_proj=2.5"
    )


@pytest.mark.parametrize(
    "word",
    [
        "--config." + "x" * 100_000 + "=1",
        "--config.steps=" + "[" * 100_000,
        "--config.seed=1e300",
    ],
    ids=["key", "value", "number"],
)
def test_what_is_out_of_all_proportion_is_a_short_line(word):
    assert len(fails(RECIPE, word)) < 500
