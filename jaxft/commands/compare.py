"""`jaxft compare`."""

from __future__ import annotations

import argparse
import time

HELP = "find out which lever fits: prompt, retrieval, LoRA, full tuning, ..."
EPILOG = """\
Measured are those levers that what is given allows; the others are named with the reason. Every key is documented in
configs/compare.py:

  jaxft compare --config configs/compare.py --workdir runs/which --config.model=path/to/model \\
      --config.data.train=train.jsonl --config.data.eval=test.jsonl --documents handbook/ --config.budget=30m

A comparison that was broken off goes on with the same command. --config RUN/repeat.json makes the same figures again.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="a recipe, or a comparison's repeat.json"
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the comparison's folder")
    parser.add_argument(
        "--documents",
        nargs="+",
        default=[],
        metavar="PATH",
        help="for retrieval, as of jaxft index",
    )
    parser.add_argument("--explain", action="store_true", help="print each step of the reasoning")


def run(
    config: str, workdir: str, documents: list[str], explain: bool, overrides: list[str]
) -> None:
    """Runs the verb."""
    began = time.perf_counter()  # reading the program is time of the user's too
    from jaxft.configuration.comparing import load_comparison
    from jaxft.configuration.keys import assign

    settings = load_comparison(config, overrides)
    if documents:
        assign(settings, "data.documents", tuple(documents))
    from jaxft.comparison.compare import compare
    from jaxft.comparison.report import report_lines
    from jaxft.runtime.processes import leave

    result = compare(settings, workdir, began=began)
    print(*report_lines(result, explain=explain), sep="\n")
    if result["budget"] and result["seconds"] > result["budget"]:
        leave(0)  # what was broken off still runs in XLA's threads, and Python would wait for it
