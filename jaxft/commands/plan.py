"""`jaxft plan`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import number

HELP = "what a run needs, by the compiler"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--config", required=True, metavar="FILE.py:METHOD", help="as of train")
    parser.add_argument(
        "--topology", default="", metavar="KIND:SHAPE", help="a TPU slice, as v5e:4x4"
    )
    parser.add_argument("--device", default="", metavar="local", help="this machine's devices")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object")
    parser.add_argument("--methods", default="", metavar="A,B", help="compare these, or all")
    parser.add_argument("--remats", default="", metavar="A,B", help="compare these, or all")
    parser.add_argument(
        "--quantize", dest="schemes", default="", metavar="A,B", help="compare these"
    )
    parser.add_argument(
        "--show-sharding", dest="show", action="store_true", help="how each leaf lies on the mesh"
    )
    parser.add_argument(
        "--find-batch", dest="find", action="store_true", help="the largest batch_size that fits"
    )
    parser.add_argument("--plot", default="", metavar="FILE.png", help="a chart of the memory")
    parser.add_argument(
        "--price", type=number(0.0), default=0.0, metavar="P", help="of a device for an hour"
    )


def run(config: str, overrides: list[str], **flags: Any) -> None:
    """Runs the verb."""
    from jaxft.configuration import Recipe

    recipe = Recipe(config, overrides)
    settings = recipe.config()
    from jaxft.planning.command import main

    main(settings, for_method=recipe.for_method, **flags)
