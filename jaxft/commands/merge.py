"""`jaxft merge`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "write base and adapter as one Hugging Face folder"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a PEFT folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument(
        "--quantize", default="none", choices=("none", "nf4", "fp4", "int8"), help="write it so"
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16"),
        help="what to store; default: the base's",
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.merge import merge_folder

    merge_folder(**flags)
