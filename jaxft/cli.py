"""The command line: finds the verb, one file of `jaxft.commands`, and tells how it ended."""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxft.errors import Stalled, UserError, nearest
from jaxft.runtime.platforms import without_absent_tpus

VERBS = (
    "train", "evaluate", "data", "generate", "chat", "merge", "plan", "quantize", "import", "export", "push",
    "index", "compare", "serve", "report", "quickstart",
)  # fmt: skip
CONFIGURED = ("train", "data", "plan", "compare")  # take --config.KEY=VALUE

# Flags of other programs, by ours.
THEIRS = {
    "output_dir": ("--workdir", "--output"),
    "model_name_or_path": ("--model",),
    "pretrained_model_name_or_path": ("--model",),
    **dict.fromkeys(("adapter_name_or_path", "peft_model_id", "lora_path", "peft"), ("--adapter",)),
    "torch_dtype": ("--dtype",),
    "max_tokens": ("--max-new-tokens",),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and which takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"^-\.?\d")  # values too: --weights -0.5,1

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
    from jaxft.commands.apart import apart

    return apart(main) if sys.argv[1:2] == ["plan"] else main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 only if the work is done.

    A user's mistake is one line on stderr and status 2; Ctrl-C is 130 and SIGTERM 143, as in a shell. Where the
    runtime has stalled, this process ends with 75, which is `EX_TEMPFAIL`: the same command goes on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _status(words)
    except Stalled as error:
        from jaxft.runtime import processes

        print(f"jaxft: {error}", file=sys.stderr)
        processes.leave(os.EX_TEMPFAIL)  # an orderly end would wait for the runtime
    if status and "jaxft.runtime.processes" in sys.modules:
        from jaxft.runtime import processes

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
        raise UserError(f"a verb is needed: {', '.join(VERBS)}; jaxft --help says more")
    name = words[0]
    if name in verbs:
        overrides, rest = _overrides(words[1:]) if name in CONFIGURED else ([], words[1:])
        _known_flags(verbs[name], rest, name in CONFIGURED)
        given = vars(verbs[name].parse_args(rest))
        without_absent_tpus()
        _module(name).run(**given, **({"overrides": overrides} if name in CONFIGURED else {}))
    elif name.startswith("-"):
        _known_flags(parser, words[:1])
        parser.parse_args(words)
    else:
        close = nearest(name, VERBS) or f"; there are: {', '.join(VERBS)}"
        raise UserError(f"unknown verb {name!r}{close}")


def _module(verb: str) -> Any:
    return importlib.import_module(f"jaxft.commands.{verb}")


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="jaxft", description="Fine-tunes language models in JAX.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    added: dict[str, Parser] = {}
    for name in VERBS:
        verb = _module(name)
        added[name] = verbs.add_parser(name, help=verb.HELP, epilog=getattr(verb, "EPILOG", None))
        verb.add_flags(added[name])
    return parser, added


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


def _known_flags(
    parser: argparse.ArgumentParser, words: Sequence[str], configured: bool = False
) -> None:
    """Raises UserError for a flag that the verb does not have: what is meant by it, or the nearest."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag not in flags:
            if not equals:
                behind = itertools.takewhile(lambda w: not w.startswith("--"), words[index + 1 :])
                value = ",".join(behind)
            close = _meant(flag, value, flags, configured) or nearest(flag, flags)
            close = close or f"; there are: {', '.join(flags)}"
            raise UserError(f"{parser.prog.removeprefix('jaxft ')}: unknown flag {flag!r}{close}")


def _meant(flag: str, value: str, flags: Sequence[str], configured: bool) -> str:
    """What to write for a flag that another program has, or for a key without `--config.`; "" for others."""
    name = flag.removeprefix("--").replace("-", "_")
    ours = [known for known in THEIRS.get(name, ()) if known in flags]
    if ours:
        return f"; write {ours[0]} {value}".rstrip()
    if configured:
        from jaxft.configuration.keys import said_of_flag

        said = said_of_flag(name, value)
        return f"; write {said}" if said else ""
    return ""


if __name__ == "__main__":
    sys.exit(main())
