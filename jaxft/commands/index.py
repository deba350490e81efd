"""`jaxft index`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jaxft.commands.flags import whole
from jaxft.errors import UserError, counted

HELP = "make an index of documents, for --retrieve, or bring it up to date"
EPILOG = """\
A path that is named again is looked through again: its new and changed documents are added, those that are gone
removed, and the others kept as they are. Settings are those of the index that is there.
  jaxft index --documents handbook/ --output INDEX
  jaxft index --documents handbook/ notes.jsonl --output INDEX
  jaxft index --remove notes.jsonl --output INDEX
  jaxft index --calibrate questions.jsonl --output INDEX
"""
SETTINGS = (
    "tokenizer", "tokens", "overlap", "stop_words", "embed", "embed_model", "store", "text_key",
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags. A setting that is not given is None: the index that is there has its own."""
    parser.add_argument(
        "--documents",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders, globs: txt, md, html, pdf, and rows of jsonl, csv, parquet",
    )
    parser.add_argument("--output", required=True, metavar="INDEX", help="the index's folder")
    parser.add_argument(
        "--remove", nargs="+", default=[], metavar="PATH", help="take documents away again"
    )
    parser.add_argument(
        "--calibrate",
        default="",
        metavar="FILE",
        help="questions by which --refuse knows what no passage answers",
    )
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument(
        "--model", dest="tokenizer", metavar="DIR", help="whose tokens are counted; default: tiny"
    )
    tokens.add_argument("--tokenizer", metavar="DIR", help="the same, of a tokenizer alone")
    parser.add_argument(
        "--chunk-tokens", dest="tokens", type=whole(1), metavar="N", help="at most; default: 128"
    )
    parser.add_argument(
        "--overlap", type=whole(0), metavar="N", help="tokens of the chunk before; default: 0"
    )
    parser.add_argument(
        "--stop-words", metavar="L", help="en (default), german, french, ..., or none"
    )
    parser.add_argument(
        "--embed",
        choices=("none", "static", "model"),
        help="search by vectors too: static (wordllama), or a model's hidden states",
    )
    parser.add_argument("--embed-model", metavar="DIR", help="of --embed model; default: --model")
    parser.add_argument(
        "--store", metavar="S", help="lancedb:URI, qdrant:LOCATION or opensearch:URL"
    )
    parser.add_argument("--text-key", metavar="KEY", help="of rows; default: text")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="name what cannot be read, and go on"
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.retrieval import calibrate, update_index

    given = {name: flags[name] for name in SETTINGS if flags[name] is not None}
    output, documents, removed = flags["output"], flags["documents"], flags["remove"]
    if not (documents or removed or flags["calibrate"]):
        raise UserError("index: --documents, --remove or --calibrate says what to do")
    if given.get("embed") == "model":
        given.setdefault("embed_model", given.get("tokenizer", "tiny"))
    elif "embed_model" in given:
        raise UserError("index: --embed-model goes with --embed model")
    if documents or removed:
        options = {"removed": removed, "skip_unreadable": flags["skip_unreadable"]}
        _, report = update_index(output, documents, given, **options)
        unreadable = report.unreadable
        for _, reason in unreadable.files:
            print(f"jaxft: left out: {reason}", file=sys.stderr)
        if unreadable.files:
            what = counted(len(unreadable.files), "file or row", "files or rows")
            print(f"jaxft: {what} could not be read", file=sys.stderr)
        if unreadable.other:
            names = ", ".join(unreadable.other[:4]) + ", ..." * (len(unreadable.other) > 4)
            print(f"jaxft: of another kind, not read: {names}", file=sys.stderr)
        print(f"{output}: {report}")
    if flags["calibrate"]:
        print(f"{output}: {calibrate(output, flags['calibrate'])}")
