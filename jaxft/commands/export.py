"""`jaxft export`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "write a model or an adapter for llama.cpp and Ollama"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument(
        "--adapter", default="", metavar="DIR", help="a PEFT folder: written alone, or merged"
    )
    parser.add_argument("--format", default="gguf", choices=("gguf",), help="the only one yet")
    parser.add_argument("--output", required=True, metavar="FILE", help="a file that is new")
    parser.add_argument(
        "--type",
        dest="kind",
        default="f16",
        choices=("f16", "q8_0", "f32"),
        help="how a model's kernels are packed; default: f16",
    )
    parser.add_argument(
        "--merge", dest="merged", action="store_true", help="write the model with the adapter in it"
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.gguf.writing import export_gguf

    del flags["format"]
    print(export_gguf(**flags))
