"""What the verbs' flags take: readers of their values, and flags that several verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jaxft.defaults import MAX_NEW_TOKENS, PASSAGES
from jaxft.errors import UserError


def whole(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = float(text)  # 1e3 is a whole number
        except ValueError:
            value = float("nan")
        if not low <= value < 2**31 or not value.is_integer():
            raise argparse.ArgumentTypeError(f"takes a whole number from {low}, not {text!r}")
        return int(value)

    return read


def number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high) or value == float("inf"):
            upper = "" if high == float("inf") else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"takes a number from {low:g}{upper}, not {text!r}")
        return value

    return read


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    return [number(-1e30, 1e30)(part) for part in text.split(",")]


def add_asked(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which model is asked, and how."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder, or OWNER/NAME of the hub"
    )
    parser.add_argument("--adapter", default="", metavar="DIR", help="a PEFT folder")
    add_words(parser)


def add_words(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say by which tokenizer and template a model is asked."""
    parser.add_argument("--system", default="", metavar="TEXT", help="a chat's system message")
    parser.add_argument(
        "--chat-template",
        default="",
        metavar="T",
        help="a name, as chatml, or a file; default: the adapter's, else the tokenizer's",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="DIR", help="a folder with another tokenizer.json"
    )
    parser.add_argument(
        "--date",
        default="",
        metavar="DAY",
        help="what a chat template takes for today, as 2024-02-29; default: today",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how tokens are chosen, and how many."""
    add_length(parser)
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
    add_dtype(parser)


def add_length(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says how long an answer may be."""
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"default: {MAX_NEW_TOKENS}",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says in what a model computes."""
    parser.add_argument(
        "--dtype", default="float32", metavar="D", help="float32 (default), bfloat16 or float16"
    )


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that put passages of an index before questions."""
    parser.add_argument(
        "--retrieve", default="", metavar="INDEX", help="put passages of this index before prompts"
    )
    parser.add_argument(
        "--passages",
        type=whole(1),
        default=PASSAGES,
        metavar="N",
        help=f"of --retrieve; default: {PASSAGES}",
    )
    parser.add_argument(
        "--budget",
        type=whole(0),
        default=0,
        metavar="N",
        help="tokens of passages and question; default: 1024, or what the model reads",
    )
    parser.add_argument(
        "--passage-template",
        default="",
        metavar="T",
        help="a file, or a text with {passages} and {question}",
    )
    parser.add_argument(
        "--search",
        default="auto",
        choices=("auto", "lexical", "dense", "hybrid"),
        help="auto: hybrid where the index embeds",
    )
    parser.add_argument(
        "--refuse",
        action="store_true",
        help="questions that no passage answers, by the index's threshold",
    )


def retrieval_of(flags: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Takes the flags of `add_retrieval` away; gives tokenizer -> what puts passages before prompts, None for none.

    Raises:
        UserError: flags that go with --retrieve, without it.
    """
    index = flags.pop("retrieve")
    options = {
        "passages": flags.pop("passages"),
        "budget": flags.pop("budget"),
        "template": flags.pop("passage_template"),
        "how": flags.pop("search"),
        "refuse": flags.pop("refuse"),
    }
    if not index:
        unset = {"passages": PASSAGES, "budget": 0, "template": "", "how": "auto", "refuse": False}
        if options != unset:
            raise UserError(
                "--passages, --budget, --passage-template, --search and --refuse go with --retrieve INDEX"
            )
        return None

    def before(tokenizer: Any) -> Any:
        from jaxft.retrieval import open_retriever

        return open_retriever(index, tokenizer, **options).ask

    return before
