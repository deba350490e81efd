"""`jaxft train`."""

from __future__ import annotations

import argparse

HELP = "fine-tune a model"
EPILOG = """\
Every key of the recipe can be set, and is documented in it:

  jaxft train --config configs/sft.py:dora --workdir runs/dora \\
      --config.model=path/to/model --config.data.train=train.jsonl \\
      --config.method.rank=8 --config.method.targets=q_proj,v_proj

A run that was broken off goes on with the same command. --config RUN/config.json runs a run again.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:METHOD",
        help="a recipe and its argument, or a run's config.json",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="RUN", help="the run's folder; may be gs://..."
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, also where the environment does not say so (Cloud TPU)",
    )


def run(config: str, workdir: str, distributed: bool, overrides: list[str]) -> None:
    """Runs the verb."""
    from jaxft.runs.signals import stoppable

    with stoppable():  # SIGTERM while modules are imported
        _train(config, workdir, distributed, overrides)


def _train(config: str, workdir: str, distributed: bool, overrides: list[str]) -> None:
    from jaxft.configuration import load_config
    from jaxft.runtime import processes

    settings = load_config(config, overrides)
    processes.join(distributed)
    from jaxft.training.start import train

    with processes.fate_shared():
        result = train(settings, workdir)
    if processes.first():
        print(f"{result.output}\n{result.plot}")
