"""`jaxft generate`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import add_asked, add_retrieval, add_sampling, retrieval_of, whole

HELP = "continue prompts, or answer them"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="repeatable"
    )
    source.add_argument("--data", default="", metavar="FILE", help="JSONL with prompts or messages")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a prompt is a user's message, or not; by default as the model was trained",
    )
    add_asked(parser)
    add_sampling(parser)
    add_retrieval(parser)
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

    before = retrieval_of(flags)
    if before is not None:
        flags["before"] = before
    main(**flags)
