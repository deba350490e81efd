"""The verbs hand their flags on, and a mistake is one line and exit status 2."""

import os
import subprocess
import sys
import time
import types

import pytest

from jaxft import cli
from jaxft.errors import UserError

VERBS = ("train", "data", "generate", "chat", "merge", "plan", "quantize", "quickstart")
ASKED = {"system": "", "chat_template": "", "tokenizer": "", "date": ""}


@pytest.fixture
def called(monkeypatch):
    """Puts a recorder in the place of each function that a verb calls."""
    calls = []

    def stand_in(module, name, *positional):
        def record(*values, **flags):
            calls.append((name, dict(zip(positional, values, strict=True)) | flags))
            return types.SimpleNamespace(output="RUN/adapter", plot="RUN/plots/loss.png")

        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: record}))

    stand_in("jaxft.training.start", "train", "config", "workdir")
    stand_in("jaxft.inference.generate", "main")
    stand_in("jaxft.inference.chat", "main")
    stand_in("jaxft.objectives.preview", "main", "config")
    stand_in("jaxft.formats.combining", "merge_adapters")
    stand_in("jaxft.quickstart", "quickstart")
    return calls


def mistake(capsys, *words):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxft: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("weights", ["-0.5,1", "-.5,1", "-1,2"])
def test_a_value_may_begin_with_a_minus(called, weights):
    adapters = ["--adapter", "a", "--adapter", "b", "--output", "c"]
    assert cli.main(["merge", *adapters, "--weights", weights]) == 0
    [(_, given)] = called
    assert given["weights"] == [float(part) for part in weights.split(",")]


def test_train_loads_the_configuration_with_its_overrides(called):
    words = ["train", "--config.method.rank", "4", "--config", "configs/sft.py:dora"]
    words += ["--workdir=runs/a", '--config.method.targets=("q_proj","v_proj")']
    assert cli.main(words) == 0
    [(name, given)] = called
    assert (name, given["workdir"]) == ("train", "runs/a")
    assert (given["config"].method.name, given["config"].method.rank) == ("dora", 4)
    assert given["config"].method.targets == ("q_proj", "v_proj")


def test_a_sweep_is_a_loop_over_overrides(called):
    for rank in ("4", "8"):
        for rate in ("1e-4", "2e-4"):
            words = [f"--config.method.rank={rank}", f"--config.optimizer.learning_rate={rate}"]
            workdir = f"runs/r{rank}-{rate}"
            words = ["train", "--config", "configs/sft.py:lora", *words, "--workdir", workdir]
            assert cli.main(words) == 0
    seen = [
        (given["config"].method.rank, given["config"].optimizer.learning_rate)
        for _, given in called
    ]
    assert seen == [(4, 1e-4), (4, 2e-4), (8, 1e-4), (8, 2e-4)]


def test_data_loads_the_configuration_as_train_does(called):
    words = ["data", "--config", "configs/sft.py:lora", "--config.data.packing=true"]
    assert cli.main([*words, "--plot", "lengths.png", "--examples=7"]) == 0
    [(name, given)] = called
    assert (name, given["plot"], given["shown"]) == ("main", "lengths.png", 7)
    assert given["config"].data.packing is True


def test_generate_hands_its_flags_on(called):
    words = ["generate", "--model", "m", "--adapter", "a", "--prompt", "one", "--prompt", "two"]
    words += ["--max-new-tokens", "8", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9"]
    words += ["--dtype", "bfloat16", "--batch-size=4"]
    assert cli.main([*words, "--seed", "3"]) == 0
    flags = {"model": "m", "adapter": "a", "prompts": ["one", "two"], "data": ""}
    flags |= {"max_new_tokens": 8, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    flags |= {"dtype": "bfloat16", "batch_size": 4, **ASKED, "chat": None}
    assert called == [("main", flags)]


def test_generate_and_chat_may_be_told_how_a_prompt_is_asked(called):
    words = ["--model", "m", "--system", "Be brief.", "--chat-template", "chatml", "--tokenizer=t"]
    assert cli.main(["generate", *words, "--chat", "--prompt", "a"]) == 0
    assert cli.main(["generate", *words, "--no-chat", "--prompt", "a"]) == 0
    assert cli.main(["chat", *words, "--temperature=0.5"]) == 0
    (_, first), (_, second), (_, third) = called
    assert (first["chat"], second["chat"]) == (True, False)
    asked = {"system": "Be brief.", "chat_template": "chatml", "tokenizer": "t"}
    for given in (first, second, third):
        assert {name: given[name] for name in asked} == asked
    assert (third["max_new_tokens"], third["temperature"]) == (128, 0.5)


def test_generate_is_greedy_unless_told(called):
    assert cli.main(["generate", "--model", "m", "--data", "prompts.jsonl"]) == 0
    flags = {"model": "m", "adapter": "", "prompts": [], "data": "prompts.jsonl"}
    flags |= {"max_new_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    flags |= {"dtype": "float32", "batch_size": 8, **ASKED, "chat": None}
    assert called == [("main", flags)]


def test_merge_and_quickstart_hand_their_flags_on(called):
    assert cli.main(["merge", "--model", "m", "--adapter", "a", "--output", "o"]) == 0
    assert cli.main(["quickstart", "--workdir", "w"]) == 0
    assert called == [
        (
            "merge_adapters",
            {"model": "m", "adapters": ["a"], "output": "o", "quantize": "none", "dtype": ""},
        ),
        ("quickstart", {"workdir": "w"}),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"a verb is needed: {', '.join(cli.VERBS)}"),
        (["trian"], "unknown verb 'trian' (nearest: 'train')"),
        (["xyzzy"], f"there are: {', '.join(cli.VERBS)}"),
        (["--verson"], "unknown flag '--verson' (nearest: '--version')"),
        (["train", "--workdri", "x"], "train: unknown flag '--workdri' (nearest: '--workdir'"),
        (["train", "--confg.seed=1"], "unknown flag '--confg.seed' (nearest: '--config'"),
        (["train", "--workdir", "x"], "train: the following arguments are required: --config"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--config.seed"], "--config.seed needs a value: --config.seed=VALUE"),
        (["generate", "--model", "m"], "one of the arguments --prompt --data is required"),
        (["generate", "--model", "m", "--prompt", "a", "--data", "b"], "not allowed with"),
        (["generate", "--model", "m", "--max_new_tokens=3"], "(nearest: '--max-new-tokens'"),
        (["merge", "--config.seed=3"], "merge: unknown flag '--config.seed'"),
        (["merge", "extra", "--model=m", "--adapter=a", "--output=o"], "extra"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, called, words, says):
    assert says in mistake(capsys, *words)
    assert called == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--top-p", "1.5"),
        ("--top-k", "-1"),
        ("--temperature", "hot"),
        ("--temperature", "nan"),
        ("--max-new-tokens", "0"),
        ("--batch-size", "0"),
        ("--seed", "1.5"),
    ],
)
def test_a_wrong_number_names_the_flag_and_the_value(capsys, called, flag, value):
    said = mistake(capsys, "generate", "--model=m", "--prompt=a", f"{flag}={value}")
    assert flag in said
    assert repr(value) in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config.method.rnak=3"], "no key config.method.rnak (nearest: config.method.rank"),
        (["--config.steps=x"], "config.steps takes a whole number, not 'x'"),
    ],
)
def test_a_wrong_override_is_one_line(capsys, called, words, says):
    config = ["train", "--config", "configs/sft.py:lora", "--workdir", "x"]
    assert says in mistake(capsys, *config, *words)
    assert called == []


def test_a_users_mistake_is_told_and_others_are_not_hidden(capsys, monkeypatch):
    def broken(error):
        def run(**_):
            raise error

        monkeypatch.setitem(sys.modules, "jaxft.quickstart", types.SimpleNamespace(quickstart=run))

    broken(UserError("data.jsonl:3: not JSON\nat all"))
    assert mistake(capsys, "quickstart") == "jaxft: data.jsonl:3: not JSON at all\n"
    broken(KeyboardInterrupt())
    assert cli.main(["quickstart"]) == 130
    assert capsys.readouterr().err == "jaxft: interrupted\n"
    broken(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["quickstart"])


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "-h"] for verb in VERBS)])
def test_help_and_version_exit_with_0(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("jaxft 0." if words == ["--version"] else "usage: jaxft")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["trian"]])
def test_help_needs_no_jax(words):
    code = (
        "import sys, jaxft.cli\n"
        "try: jaxft.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, env=os.environ
    )
    assert time.perf_counter() - start < 5  # tenths of a second; a machine of tests may be busy
