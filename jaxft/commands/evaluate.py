"""`jaxft evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import (
    add_dtype,
    add_length,
    add_retrieval,
    add_words,
    retrieval_of,
    whole,
)

HELP = "score a model on held-out rows, or compare several"
EPILOG = """\
metrics: loss, perplexity, token_accuracy (of what stands in the rows); exact, contains, f1, bleu, bleu_lower, chrf,
rouge1, rouge2, rougeL, nist, cider (of answers beside references); preference_accuracy,
preference_accuracy_per_token, preference_margin (of rows with chosen and rejected)
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    _add_scored(parser)
    parser.add_argument("--output", default="", metavar="FILE.jsonl", help="every item's scores")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one object")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="what --output wrote, of the same items, without a model",
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="NAMES",
        help="lm-eval's tasks or .yaml files, with commas between, instead of --data",
    )
    parser.add_argument(
        "--limit", type=whole(1), default=None, metavar="N", help="documents of each task"
    )
    parser.add_argument(
        "--training", default="", metavar="FILE", help="count the items that stand in these rows"
    )
    parser.add_argument(
        "--untouched",
        default="",
        metavar="FILE",
        help="rows that were not trained on: how the adapters change the loss there",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a prompt is a user's message, or not; by default as the model was trained",
    )
    add_words(parser)
    add_retrieval(parser)
    add_length(parser)
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help="default: 8")
    add_dtype(parser)


def _add_scored(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is scored, on what, and how."""
    parser.add_argument(
        "--model", default="", metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        metavar="DIR",
        help="a PEFT folder; several are compared on the same items",
    )
    parser.add_argument(
        "--base", action="store_true", help="the model without the adapters too, compared with them"
    )
    parser.add_argument("--data", default="", metavar="FILE", help="rows, as for training")
    parser.add_argument(
        "--metrics", default="", metavar="NAMES", help="with commas between; default: loss,exact"
    )
    parser.add_argument(
        "--grader", default="", metavar="FILE.json", help="graders of answers, a metric each"
    )
    parser.add_argument(
        "--normalize",
        default="spaces",
        metavar="HOW",
        help="how texts are read before exact, contains and f1: none, spaces (default), lower, squad",
    )
    parser.add_argument(
        "--cluster",
        default="",
        metavar="KEY",
        help="a key of the rows: items that share its value are resampled together",
    )
    parser.add_argument(
        "--field",
        dest="fields",
        action="append",
        default=[],
        metavar="KEY=NAME",
        help="what a key is called in the rows, as prompt=question; repeatable",
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.evaluation.command import main

    before = retrieval_of(flags)
    main(**flags, before=before)
