"""The command line: each verb reads its flags and calls one function, imported when needed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxft.errors import Stalled, UserError, nearest

EXAMPLES = """\
Every key of the recipe can be set, and is documented in it:

  jaxft train --config configs/sft.py:dora --workdir runs/dora \\
      --config.model=path/to/model --config.data.train=train.jsonl \\
      --config.method.rank=8 --config.method.targets=q_proj,v_proj

A run that was broken off goes on with the same command. --config RUN/config.json runs a run again.
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and which takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('jaxft').strip()}: {message}".lstrip(": "))


class Version(argparse.Action):
    """Prints the installed version and exits."""

    def __call__(self, *_: Any) -> None:
        from importlib.metadata import version

        print(f"jaxft {version('jaxft')}")
        sys.exit(0)


def program() -> int:
    """`main` as a process of its own, in which Orbax is quiet where a write fails.

    It closes an event loop that its other writes still call; each would print a traceback around jaxft's one line.
    """
    told = sys.unraisablehook

    def tell(what: sys.UnraisableHookArgs) -> None:
        if str(what.exc_value) != "Event loop is closed":
            told(what)

    sys.unraisablehook = tell
    logging.getLogger("asyncio").addFilter(
        lambda record: "Task exception was never retrieved" not in record.getMessage()
    )
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 only if the work is done.

    A user's mistake is one line on stderr and status 2; Ctrl-C is 130 and SIGTERM 143, as in a shell. Where the
    runtime has stalled, this process ends with 75, which is `EX_TEMPFAIL`: the same command goes on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _status(words)
    except Stalled as error:
        from jaxft import processes

        print(f"jaxft: {error}", file=sys.stderr)
        processes.leave(os.EX_TEMPFAIL)  # an orderly end would wait for the runtime
    if status and "jaxft.processes" in sys.modules:
        from jaxft import processes

        if processes.several():
            processes.leave(status)
    return status


def _status(words: list[str]) -> int:
    try:
        _run(words)
    except UserError as error:
        print(f"jaxft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxft: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(words: list[str]) -> None:
    parser, verbs = _parsers()
    if not words:
        raise UserError(f"a verb is needed: {', '.join(verbs)}; jaxft --help says more")
    if words[0] in verbs:
        verb = verbs[words[0]]
        takes_config = words[0] in ("train", "data", "plan")
        overrides, rest = _overrides(words[1:]) if takes_config else ([], words[1:])
        _known_flags(verb, rest)
        given = vars(verb.parse_args(rest))
        run: Callable[..., None] = given.pop("run")
        run(**given, **({"overrides": overrides} if takes_config else {}))
    elif words[0].startswith("-"):
        _known_flags(parser, words[:1])
        parser.parse_args(words)
    else:
        close = nearest(words[0], verbs) or f"; there are: {', '.join(verbs)}"
        raise UserError(f"unknown verb {words[0]!r}{close}")


def _overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Parts `--config.KEY=VALUE` and `--config.KEY VALUE` from the other words."""
    overrides, rest, following = list[str](), list[str](), iter(words)
    for word in following:
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(following, "--")
            if value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
            overrides.append(f"{word}={value}")
    return overrides, rest


def _known_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raises UserError, naming the nearest, for a flag that the verb does not have."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            close = nearest(flag, flags) or f"; there are: {', '.join(flags)}"
            raise UserError(f"{parser.prog.removeprefix('jaxft ')}: unknown flag {flag!r}{close}")


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="jaxft", description="Fine-tunes language models in JAX.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    added = {
        "train": _train_flags(verbs.add_parser("train", help="fine-tune a model", epilog=EXAMPLES)),
        "data": _data_flags(verbs.add_parser("data", help="show what the model will see")),
        "generate": _generate_flags(verbs.add_parser("generate", help="continue prompts")),
        "merge": _merge_flags(
            verbs.add_parser("merge", help="write base and adapter as one Hugging Face folder")
        ),
        "plan": _plan_flags(verbs.add_parser("plan", help="what a run needs, by the compiler")),
        "quantize": _quantize_flags(
            verbs.add_parser("quantize", help="write a folder quantized, as bitsandbytes does")
        ),
        "quickstart": _quickstart_flags(
            verbs.add_parser("quickstart", help="fine-tune the embedded model: a look in minutes")
        ),
    }
    return parser, added


def _train_flags(parser: Parser) -> Parser:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:METHOD",
        help="a recipe and its argument, or a run's config.json",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="RUN", help="the run's folder; may be gs://..."
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, also where the environment does not say so (Cloud TPU)",
    )
    parser.set_defaults(run=train)
    return parser


def _data_flags(parser: Parser) -> Parser:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:METHOD",
        help="as for train, with --config.KEY=VALUE; the model's weights are not read",
    )
    parser.add_argument(
        "--examples",
        dest="shown",
        type=_whole(0),
        default=3,
        metavar="N",
        help="decoded examples, spread over the training data; default: 3",
    )
    parser.add_argument("--plot", default="", metavar="PNG", help="lengths as a new PNG file")
    parser.set_defaults(run=data)
    return parser


def _generate_flags(parser: Parser) -> Parser:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--adapter", default="", metavar="DIR", help="a PEFT folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="repeatable"
    )
    source.add_argument("--data", default="", metavar="FILE", help="JSONL with prompts or messages")
    parser.add_argument("--max-new-tokens", type=_whole(1), default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=_number(0.0), default=0.0, metavar="T", help="0, the default: greedy"
    )
    parser.add_argument(
        "--top-k", type=_whole(0), default=0, metavar="K", help="of the K likeliest; 0: of all"
    )
    parser.add_argument(
        "--top-p", type=_number(0.0, 1.0), default=1.0, metavar="P", help="of those that sum to P"
    )
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N")
    parser.add_argument(
        "--dtype", default="float32", metavar="D", help="float32 (default), bfloat16 or float16"
    )
    parser.add_argument("--batch-size", type=_whole(1), default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="JSON lines, as to a file or pipe, on a terminal too",
    )
    parser.set_defaults(run=generate)
    return parser


def _merge_flags(parser: Parser) -> Parser:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a PEFT folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument(
        "--quantize", default="none", choices=("none", "nf4", "fp4", "int8"), help="write it so"
    )
    parser.set_defaults(run=merge)
    return parser


def _plan_flags(parser: Parser) -> Parser:
    parser.add_argument("--config", required=True, metavar="FILE.py:METHOD", help="as of train")
    parser.add_argument(
        "--topology", default="", metavar="KIND:SHAPE", help="a TPU slice, as v5e:4x4"
    )
    parser.add_argument("--device", default="", metavar="local", help="this machine's devices")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object")
    parser.add_argument("--methods", default="", metavar="A,B", help="compare these, or all")
    parser.add_argument("--remats", default="", metavar="A,B", help="compare these, or all")
    parser.add_argument(
        "--quantize", dest="schemes", default="", metavar="A,B", help="compare these"
    )
    parser.add_argument(
        "--show-sharding", dest="show", action="store_true", help="how each leaf lies on the mesh"
    )
    parser.add_argument(
        "--find-batch", dest="find", action="store_true", help="the largest batch_size that fits"
    )
    parser.add_argument("--plot", default="", metavar="FILE.png", help="a chart of the memory")
    parser.add_argument(
        "--price", type=_number(0.0), default=0.0, metavar="P", help="of a device for an hour"
    )
    parser.set_defaults(run=plan)
    return parser


def _quantize_flags(parser: Parser) -> Parser:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new")
    parser.add_argument("--scheme", default="nf4", help="nf4, the default, fp4 or int8")
    parser.add_argument("--group-size", type=_whole(1), default=64, metavar="N")
    parser.add_argument(
        "--single", dest="double_quant", action="store_false", help="leave the scales in float32"
    )
    parser.set_defaults(run=quantize)
    return parser


def _quickstart_flags(parser: Parser) -> Parser:
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="RUN", help="default: runs/quickstart"
    )
    parser.set_defaults(run=quickstart)
    return parser


def _whole(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = float(text)  # 1e3 is a whole number
        except ValueError:
            value = float("nan")
        if not low <= value < 2**31 or not value.is_integer():
            raise argparse.ArgumentTypeError(f"takes a whole number from {low}, not {text!r}")
        return int(value)

    return read


def _number(low: float, high: float = float("inf")) -> Callable[[str], float]:
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


def train(config: str, workdir: str, distributed: bool, overrides: list[str]) -> None:
    """`jaxft train`."""
    from jaxft.training.signals import stoppable

    with stoppable():  # SIGTERM while modules are imported
        _train(config, workdir, distributed, overrides)


def _train(config: str, workdir: str, distributed: bool, overrides: list[str]) -> None:
    from jaxft import processes
    from jaxft.configuration import load_config

    settings = load_config(config, overrides)
    processes.join(distributed)
    from jaxft.training.loop import train as run

    with processes.fate_shared():
        result = run(settings, workdir)
    if processes.first():
        print(f"{result.output}\n{result.plot}")


def data(config: str, overrides: list[str], **flags: Any) -> None:
    """`jaxft data`."""
    from jaxft.configuration import load_config

    settings = load_config(config, overrides)
    from jaxft.training.preview import main as run

    run(settings, **flags)


def generate(**flags: Any) -> None:
    """`jaxft generate`."""
    from jaxft.inference.generate import main as run

    run(**flags)


def merge(**flags: Any) -> None:
    """`jaxft merge`."""
    from jaxft.formats.merge import merge_folder

    merge_folder(**flags)


def plan(config: str, overrides: list[str], **flags: Any) -> None:
    """`jaxft plan`."""
    from jaxft.configuration import load_config

    settings = load_config(config, overrides)
    from jaxft.planning.command import main as run

    run(settings, **flags)


def quantize(**flags: Any) -> None:
    """`jaxft quantize`."""
    from jaxft.formats.merge import quantize_folder

    quantize_folder(**flags)


def quickstart(**flags: Any) -> None:
    """`jaxft quickstart`."""
    from jaxft.quickstart import quickstart as run

    run(**flags)


if __name__ == "__main__":
    sys.exit(main())
