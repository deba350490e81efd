"""`jaxft quantize`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import whole
from jaxft.defaults import GROUP_SIZE

HELP = "write a folder quantized, as bitsandbytes does"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument("--scheme", default="nf4", help="nf4, the default, fp4 or int8")
    parser.add_argument("--group-size", type=whole(1), default=GROUP_SIZE, metavar="N")
    parser.add_argument(
        "--single", dest="double_quant", action="store_false", help="leave the scales in float32"
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.merge import quantize_folder

    quantize_folder(**flags)
