"""Names of PEFT's, TRL's and transformers': what to write instead of them here."""

import re
import shlex

import pytest

from jaxft import cli
from jaxft.configuration import flatten, load_config
from jaxft.configuration.elsewhere import RENAMED, SAID, VALUES, told
from jaxft.configuration.keys import said_of_flag
from jaxft.errors import UserError

RECIPE = "configs/sft.py:lora"
# What people type most, by what is meant.
MEANT = {
    "lora_r=8": "--config.method.rank=8",
    "r=8": "--config.method.rank=8",
    "lora_alpha=16": "--config.method.alpha=16",
    "lora_dropout=0.1": "--config.method.dropout=0.1",
    "target_modules=q_proj,v_proj": "--config.method.targets=q_proj,v_proj",
    "modules_to_save=lm_head": "--config.method.train_also=PATTERNS",
    "use_rslora=True": "--config.method.rank_stabilized=True",
    "use_dora=True": "--config=configs/sft.py:dora",
    "per_device_train_batch_size=4": "--config.batch_size=N, the sequences of a whole update",
    "gradient_accumulation_steps=4": "--config.grad_accum=4",
    "num_train_epochs=3": "--config.epochs=3",
    "max_steps=100": "--config.steps=100",
    "max_seq_length=512": "--config.data.max_length=512",
    "lr_scheduler_type=cosine": "--config.optimizer.schedule=cosine",
    "warmup_ratio=0.03": "--config.optimizer.warmup_steps=N, in updates",
    "max_grad_norm=1.0": "--config.optimizer.clip_norm=1.0",
    "logging_steps=10": "--config.log_every=10",
    "save_steps=10": "--config.checkpoint.every=10",
    "eval_steps=10": "--config.eval_every=10",
    "save_total_limit=3": "--config.checkpoint.keep=3",
    "bf16=True": "--config.dtype=bfloat16",
    "fp16=True": "--config.dtype=float16",
    "gradient_checkpointing=True": "--config.remat=full",
    "optim=adamw_torch": "--config.optimizer.name=adamw",
    "lr_scheduler_type=constant_with_warmup": "--config.optimizer.schedule=constant, with",
    "neftune_noise_alpha=5": "nothing (there is none here)",
    "load_in_4bit=True": "--config.base.quantize=nf4",
    "beta=0.1": "--config.objective.beta=0.1, of the recipes configs/dpo.py:METHOD",
    "loss_type=ipo": "--config.objective.name=ipo",
    "dataset_name=trl-lib/Capybara": "--config.data.train=FILE",
    "model_name_or_path=m": "--config.model=DIR",
    "output_dir=out": "--workdir RUN",
    "assistant_only_loss=True": "--config.data.loss_on=completion",
    "completion_only_loss=True": "--config.data.loss_on=completion",
}
# Ours under a section or as a flag of their own: the nearest, or what to write.
OURS = {
    "max_length": "data.max_length",
    "learning_rate": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "packing": "data.packing",
    "report_to": "report_to",
    "seed": "seed",
}


@pytest.mark.parametrize("word", MEANT)
@pytest.mark.parametrize("prefix", ["", "method.", "training.", "peft.lora."])
def test_a_key_by_its_other_name_says_what_to_write(word, prefix):
    with pytest.raises(UserError) as caught:
        load_config(RECIPE, [f"--config.{prefix}{word}"])
    said = str(caught.value)
    assert said.startswith(f"no key config.{prefix}{word.partition('=')[0]}; write {MEANT[word]}")
    assert "nearest" not in said


@pytest.mark.parametrize("spelled", ["--{}={}", "--{} {}"])
@pytest.mark.parametrize("word", [*MEANT, *(f"{name}=1" for name in OURS)])
def test_a_flag_by_its_other_name_says_what_to_write(word, spelled, capsys):
    name, _, value = word.partition("=")
    meant = MEANT.get(word, f"--config.{OURS.get(name)}=1")
    meant = {"output_dir": f"--workdir {value}"}.get(name, meant)
    for flag in (name, name.replace("_", "-")):
        words = spelled.format(flag, value).split()
        assert cli.main(["train", "--config", RECIPE, "--workdir", "x", *words]) == 2
        assert f"unknown flag '--{flag}'; write {meant}" in capsys.readouterr().err


def test_several_words_behind_a_flag_are_a_list(capsys):
    words = ["--target_modules", "q_proj", "v_proj", "--config.steps=3"]
    assert cli.main(["train", "--config", RECIPE, "--workdir", "x", *words]) == 2
    assert "write --config.method.targets=q_proj,v_proj\n" in capsys.readouterr().err


def test_a_recipe_and_a_written_configuration_say_it_too(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from jaxft.configuration import recipe\n"
        "def get_config(method='lora'):\n"
        "    config = recipe('configs/sft.py', method)\n"
        "    config.lora_alpha = 16\n"
        "    return config\n"
    )
    with pytest.raises(
        UserError, match=r"no key config\.lora_alpha; write --config\.method\.alpha"
    ):
        load_config(str(recipe))


def test_other_verbs_name_their_own_flags(capsys):
    assert cli.main(["generate", "--model_name_or_path", "m", "--prompt", "a"]) == 2
    assert "unknown flag '--model_name_or_path'; write --model m" in capsys.readouterr().err
    assert cli.main(["merge", "--adapter-name-or-path=a"]) == 2
    assert "write --adapter a" in capsys.readouterr().err


def test_what_is_written_instead_is_there():
    """Every key that is named exists, and takes the value that is shown."""
    known = flatten(load_config("configs/dpo.py:lora"))
    plus = flatten(load_config("configs/sft.py:lora_plus"))
    for name, (key, example) in RENAMED.items():
        assert key in known | plus, name
        if key == "method.ratio":
            continue
        if key != "method.init" and not key.startswith("objective."):
            words = ["--config.data.eval=a.jsonl", f"--config.{key}={example}"]
            load_config("configs/dpo.py:lora", words)
    for name, said in SAID.items():
        for key in re.findall(r"--config\.([\w.]+)", said):
            assert key in known or key == "data.fields.text", name
    for key, values in VALUES.items():
        assert key in known
        assert not any(value == ours for value, ours in values.items())


def test_our_own_names_are_not_taken_for_others():
    ours = {key.split(".")[-1] for key in flatten(load_config(RECIPE))}
    assert not ours & (RENAMED.keys() | SAID.keys())
    assert told("rnak") == told("x" * 10_000) == said_of_flag("workdri", "") == ""


def test_a_value_with_blanks_is_quoted():
    assert shlex.split(told("train_file", "my file.jsonl")) == ["--config.data.train=my file.jsonl"]


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("dtype=bf16", "bfloat16"),
        ("base.quantize=4bit", "nf4"),
        ("optimizer.name=paged_adamw_8bit", "adamw"),
        ("optimizer.schedule=constant_with_warmup", "constant, with optimizer.warmup_steps"),
    ],
)
def test_a_value_of_another_library_says_ours(word, ours):
    with pytest.raises(UserError, match=f": write {ours}$"):
        load_config(RECIPE, [f"--config.{word}"])
    with pytest.raises(UserError, match=r": write dpo$"):
        load_config("configs/dpo.py:lora", ["--config.objective.name=sigmoid"])
