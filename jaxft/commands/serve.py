"""`jaxft serve`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import add_dtype, add_retrieval, retrieval_of, whole

HELP = "answer by OpenAI's protocol over HTTP"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument(
        "--name", default="", metavar="NAME", help="what requests call it; default: as --model"
    )
    _add_versions(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1")
    parser.add_argument(
        "--port", type=whole(0), default=8000, metavar="N", help="default: 8000; 0: a free one"
    )
    parser.add_argument(
        "--api-key", default="", metavar="KEY", help="answer only requests that bear it"
    )
    _add_sizes(parser)
    add_retrieval(parser)
    parser.add_argument(
        "--chat-template", default="", metavar="T", help="a name, as chatml, or a file"
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="DIR", help="a folder with another tokenizer.json"
    )
    parser.add_argument(
        "--date", default="", metavar="DAY", help="what a chat template takes for today"
    )
    add_dtype(parser)


def _add_versions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a PEFT folder, and what requests call it; repeatable",
    )
    parser.add_argument(
        "--adapters-from",
        action="append",
        default=[],
        metavar="DIR",
        help="requests may put in adapters from below it; repeatable",
    )
    parser.add_argument(
        "--room", type=whole(1), default=8, metavar="N", help="for these, at once; default: 8"
    )
    parser.add_argument(
        "--rank", type=whole(1), default=16, metavar="N", help="of these, at most; default: 16"
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", type=whole(1), default=16, metavar="N", help="sequences at once; default: 16"
    )
    parser.add_argument(
        "--context",
        type=whole(0),
        default=0,
        metavar="N",
        help="tokens of a sequence, prompt and answer; default: the model's, at most 2048",
    )
    parser.add_argument(
        "--waiting", type=whole(0), default=256, metavar="N", help="that may wait; default: 256"
    )
    parser.add_argument(
        "--stop-within",
        type=whole(0),
        default=30,
        metavar="S",
        help="seconds for answers on their way at SIGTERM; default: 30",
    )
    parser.add_argument(
        "--body-bytes",
        type=whole(1),
        default=2**22,
        metavar="N",
        help="of a request, at most; default: 4 MiB",
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.inference.serving.command import main

    main(before=retrieval_of(flags), **flags)
