"""E2E NLG (meaning representation||reference, one a line) to JSONL of prompts and completions.

    python experiments/e2e.py valid.txt e2e_valid.jsonl [--limit 1000]

The completion begins with its space, so that prompt and completion meet at a token boundary of
byte-level tokenizers. The data set: https://arxiv.org/abs/1706.09254, CC BY-SA 4.0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = "||"


def convert(lines: Iterable[str], name: str = "line") -> Iterator[dict[str, str]]:
    """Yields a prompt and a completion for each line.

    >>> next(convert(["name : Aromi | area : riverside||Aromi is by the river . "]))
    {'prompt': 'name : Aromi | area : riverside ->', 'completion': ' Aromi is by the river .'}
    """
    for number, line in enumerate(lines, start=1):
        meaning, separator, reference = line.partition(SEPARATOR)
        if not separator or not reference.strip():
            raise SystemExit(f"{name}:{number}: no {SEPARATOR} with a reference behind it")
        yield {"prompt": f"{meaning.strip()} ->", "completion": f" {reference.strip()}"}


def main() -> None:
    """Reads the first path, writes the second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--limit", type=int, help="examples to write; all if left out")
    arguments = parser.parse_args()
    lines = arguments.source.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    examples = [json.dumps(example) for example in convert(lines, str(arguments.source))]
    arguments.target.write_text("\n".join(examples) + "\n", encoding="utf-8")
    print(f"{len(examples)} examples: {arguments.target}")


if __name__ == "__main__":
    main()
