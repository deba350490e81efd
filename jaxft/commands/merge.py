"""`jaxft merge`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import number, numbers, whole

COMBINING = ("weights", "combine", "density", "rank", "majority", "seed")
HELP = "write base and adapter as one Hugging Face folder, or several adapters as one adapter"
DESCRIPTION = """\
With --model: base and adapter as one Hugging Face folder. Without it: an adapter's folder, of one adapter or of several
(--adapter repeated, with --weights), as PEFT's add_weighted_adapter makes it; one alone is stored otherwise (--dtype),
and VeRA's projections, which its seed draws, are left out. With --model several are combined and then merged."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--model", default="", metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        required=True,
        metavar="DIR",
        help="a PEFT folder; repeated: they are combined",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument(
        "--quantize", default="none", choices=("none", "nf4", "fp4", "int8"), help="write it so"
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="what to store; default: the base's; int8: of one adapter alone, for jaxft alone",
    )
    _add_combining(parser)


def _add_combining(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several adapters")
    group.add_argument(
        "--weights",
        type=numbers,
        metavar="W,W",
        help="one an adapter: --weights -1,0.5",
    )
    group.add_argument(
        "--combine",
        metavar="HOW",
        help="cat (default: exact, ranks add up), svd (the rank of the largest), linear, ties, dare, magnitude_prune "
        "(of a and b: equal ranks), and PEFT's other names: dare_linear, dare_ties, and each of them with _svd",
    )
    group.add_argument(
        "--density",
        type=number(0.0, 1.0),
        metavar="D",
        help="the share of numbers that stay, of ties, dare and magnitude_prune",
    )
    group.add_argument(
        "--rank",
        type=whole(1),
        metavar="R",
        help="of svd; default: the largest of the adapters'",
    )
    group.add_argument(
        "--majority",
        choices=("total", "frequency"),
        help="what elects a sign, of ties: the sum of the numbers, or of their signs",
    )
    group.add_argument("--seed", type=whole(0), metavar="N", help="of dare's choice")


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.combining import merge_adapters

    how = {name: flags.pop(name) for name in COMBINING}
    merge_adapters(**flags, **{name: value for name, value in how.items() if value is not None})
