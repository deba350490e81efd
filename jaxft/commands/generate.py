"""`jaxft generate`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import number, whole

HELP = "continue prompts"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--adapter", default="", metavar="DIR", help="a PEFT folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="repeatable"
    )
    source.add_argument("--data", default="", metavar="FILE", help="JSONL with prompts or messages")
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=number(0.0), default=0.0, metavar="T", help="0, the default: greedy"
    )
    parser.add_argument(
        "--top-k", type=whole(0), default=0, metavar="K", help="of the K likeliest; 0: of all"
    )
    parser.add_argument(
        "--top-p", type=number(0.0, 1.0), default=1.0, metavar="P", help="of those that sum to P"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N")
    parser.add_argument(
        "--dtype", default="float32", metavar="D", help="float32 (default), bfloat16 or float16"
    )
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="JSON lines, as to a file or pipe, on a terminal too",
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.inference.generate import main

    main(**flags)
