"""`jaxft data`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import whole

HELP = "show what the model will see"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:METHOD",
        help="as for train, with --config.KEY=VALUE; the model's weights are not read",
    )
    parser.add_argument(
        "--examples",
        dest="shown",
        type=whole(0),
        default=3,
        metavar="N",
        help="decoded examples, spread over the training data; default: 3",
    )
    parser.add_argument("--plot", default="", metavar="PNG", help="lengths as a new PNG file")


def run(config: str, overrides: list[str], **flags: Any) -> None:
    """Runs the verb."""
    from jaxft.configuration import load_config

    settings = load_config(config, overrides)
    from jaxft.objectives.preview import main

    if settings.data.retrieve:
        from jaxft.retrieval.training_rows import retrieving

        flags["reading"] = retrieving
    main(settings, **flags)
