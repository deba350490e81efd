"""The launch recipes' dry runs print commands that jaxft understands."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxft import cli
from jaxft.configuration import load_config

ROOT = Path(__file__).parents[1]
PODS = ROOT / "experiments" / "pods"
GIVEN = {
    "MODEL": "/mnt/a base",
    "TRAIN": "/mnt/train.jsonl",
    "RUN": "/mnt/run",
    "SOURCE": "git+https://example.org/jaxft",
    "MESH": "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.context=2",
    "EXTRA": "--config.steps=7",
    "DRY_RUN": "1",
}


def dry_run(command: str, **more: str) -> list[str]:
    """The lines that a recipe prints."""
    environment = {**os.environ, **GIVEN, **more}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout.splitlines()


def assert_trains(words: list[str], distributed: bool) -> None:
    """The words are `jaxft train` with flags that there are, and mean what the launcher was given."""
    assert words[:2] == ["jaxft", "train"]
    overrides, rest = cli._overrides(words[2:])
    verb = cli._parsers()[1]["train"]
    cli._known_flags(verb, rest)
    flags = verb.parse_args(rest)
    assert flags.workdir == "/mnt/run"
    assert flags.distributed is distributed
    config = load_config(str(ROOT / flags.config), overrides)
    assert (config.model, config.steps, config.mesh.fsdp) == ("/mnt/a base", 7, -1)
    assert config.mesh.context == 2


def test_slurm() -> None:
    """One task a node, started by srun, which ends all when one ends."""
    launch, command = dry_run("bash experiments/pods/slurm.sh")
    assert launch.startswith("srun --kill-on-bad-exit=1")
    assert launch.endswith("train.sh")
    assert_trains(shlex.split(command), False)


@pytest.mark.parametrize("name", ["gcloud", "xpk"])
def test_tpu_recipes(name: str) -> None:
    """Machines are made; the command goes to all of them and says that it is one of several."""
    printed = [shlex.split(line) for line in dry_run(f"bash experiments/pods/{name}.sh")]
    assert printed[0][:1] == ["gcloud" if name == "gcloud" else "xpk"]
    assert "create" in printed[0]
    commands = [
        word.partition("=")[2]
        for words in printed
        for word in words
        if word.startswith("--command=")
    ]
    training = shlex.split(commands[-1])
    assert_trains(training[training.index("jaxft") :], True)
    if name == "gcloud":
        assert printed[-1][:5] == ["gcloud", "compute", "tpus", "tpu-vm", "delete"]


def test_skypilot() -> None:
    """The task names its processes, and runs the same script."""
    task = yaml.safe_load((PODS / "sky.yaml").read_text())
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    shown = '\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"'
    command, names = dry_run(task["run"] + shown, SKYPILOT_NODE_RANK="1", **nodes)
    assert_trains(shlex.split(command), False)
    assert names == "10.0.0.1:8476 2 1"
