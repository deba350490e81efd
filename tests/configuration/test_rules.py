"""Values out of their range are refused with what the key takes."""

import pytest

from jaxft.configuration import flatten, load_config
from jaxft.configuration.rules import CHOICES, RANGES, optimizers
from jaxft.errors import UserError
from jaxft.methods import METHODS

RECIPE = "configs/sft.py:lora"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optimizer.schedule=linaer", "(nearest: 'linear'"),
        ("remat=all", "config.remat takes none | dots | outputs | full, not 'all'"),
        (
            "data.ignore=3",
            "config.data.ignore takes keys of the rows, such as context,notes, not 3",
        ),
        ("data.loss_on=completions", "(nearest: 'completion')"),
        ("objective.name=sfd", "(nearest: 'sft')"),
        ("dtype=bf16", "not 'bf16': write bfloat16"),
        ("report_to=tensorbord", "(nearest: 'tensorboard')"),
        ("optimizer.name=adamv", "Optax has no optimizer 'adamv' (nearest: 'adam"),
        ("optimizer.options={'momentun': 0.9}", "adamw has no argument 'momentun'"),
        ("optimizer.options={'b1': 0.9}", "adamw has no argument 'b1'"),
        ("batch_size=0", "takes a number of at least 1, not 0"),
        ("grad_accum=3", "config.batch_size 8 does not divide into config.grad_accum 3"),
        ("steps=-1", "0 or more, not -1"),
        ("epochs=0", "nothing would be trained"),
        ("method.dropout=1", "of at least 0 and below 1, not 1.0"),
        ("method.rank=0", "config.method.rank takes a number of at least 1"),
        ("objective.label_smoothing=-0.1", "of at least 0 and below 1"),
        ("optimizer.learning_rate=0", "above 0"),
        ("optimizer.final_fraction=1.1", "from 0 to 1, not 1.1"),
        ("mesh.fsdp=-1", "config.mesh.data and config.mesh.fsdp cannot both be -1"),
        ("mesh.tensor=0", "a number of devices or -1 (the rest), not 0"),
        ("optimizer.decay=bias", "takes a list of values"),
        ("optimizer.decay=(('bias',),)", "takes pairs such as ('bias', False)"),
    ],
)
def test_a_value_out_of_range(word, says):
    with pytest.raises(UserError) as caught:
        load_config(RECIPE, [f"--config.{word}"])
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "lion", "adam"])
def test_optax_optimizers_go_by_name(name):
    assert load_config(RECIPE, {"optimizer.name": name}).optimizer.name == name


def test_optimizers_are_those_that_a_learning_rate_suffices_for():
    known = optimizers()
    assert {"adamw", "sgd", "lamb", "muon"} - known.keys() <= {"muon"}
    assert not any(name.startswith("scale_by") or name == "lbfgs" for name in known)


def test_the_rules_are_of_keys_that_exist():
    recipes = [f"configs/{name}.py:{method}" for name in ("sft", "dpo", "rl") for method in METHODS]
    keys = {key for recipe in recipes for key in flatten(load_config(recipe))}
    ruled = set(CHOICES) | {key for _, _, names in RANGES for key in names}
    assert ruled <= keys
