"""How fast an index is made and asked, and how much memory that takes, beside bm25s alone and SQLite's FTS5.

    python experiments/retrieval_speed.py [--chunks 100000] [--queries 200] [--record FILE.json]

The chunks are made up: 60 words each, drawn by Zipf's law from 100,000, the same for all; queries have four words
that are not among the hundred commonest. Every column runs in a process of its own; seconds are of the processor,
memory is the largest resident size. jaxft is what `jaxft index` does with ten files of JSON lines:
reading, cutting by tokens, digests, BM25, writing; and then one file of ten changed. bm25s and FTS5 get the chunks
ready cut. FTS5 matches any of the words and ranks by its bm25(). With `--record` each column is written as it comes,
and those that the file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS, LENGTH, COMMON, FILES = 100_000, 60, 100, 10
DRAWN = 10_000  # chunks drawn at once: what makes them needs no memory of its own
COLUMNS = ("fts5", "bm25s", "jaxft")


def texts(chunks: int) -> Iterator[str]:
    """The chunks, one after the other."""
    draw = np.random.default_rng(0)
    for begin in range(0, chunks, DRAWN):
        ids = np.minimum(draw.zipf(1.3, (min(DRAWN, chunks - begin), LENGTH)), WORDS)
        yield from (f"{' '.join(f'w{n}' for n in row)}." for row in ids.tolist())


def queries(count: int) -> list[str]:
    """What is asked."""
    ids = np.random.default_rng(1).integers(COMMON, WORDS // 20, (count, 4))
    return [" ".join(f"w{n}" for n in row) for row in ids.tolist()]


def write(folder: Path, chunks: int) -> None:
    """The chunks as rows of ten files."""
    with contextlib.ExitStack() as stack:
        names = [folder / f"{number}.jsonl" for number in range(FILES)]
        files = [stack.enter_context(name.open("w")) for name in names]
        for number, text in enumerate(texts(chunks)):
            row = {"id": number // FILES, "text": text}
            files[number % FILES].write(json.dumps(row) + "\n")


def of_jaxft(chunks: int, asked: list[str], folder: Path) -> dict[str, float]:
    """jaxft's seconds: to build, to bring up to date, to open, to ask."""
    from jaxft.retrieval import open_index, update_index

    documents = folder / "documents"
    documents.mkdir()
    write(documents, chunks)
    settings = {"tokens": 512, "stop_words": "none"}
    began = time.process_time()
    update_index(folder / "INDEX", [str(documents)], settings)
    built = time.process_time()
    (documents / "0.jsonl").write_text((documents / "0.jsonl").read_text().replace("w1 ", "w2 "))
    changed = time.process_time()
    update_index(folder / "INDEX", [str(documents)])
    updated = time.process_time()
    index = open_index(folder / "INDEX")
    opened = time.process_time()
    index.search(asked, 10)
    end = time.process_time()
    found = {"build": built - began, "update": updated - changed, "open": opened - updated}
    return found | {"query": (end - opened) / len(asked), "bytes": _bytes(folder / "INDEX")}


def of_bm25s(chunks: int, asked: list[str], folder: Path) -> dict[str, float]:
    """The same of bm25s alone."""
    import bm25s

    said = list(texts(chunks))
    began = time.process_time()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(said, stopwords=[], show_progress=False), show_progress=False)
    index.save(folder / "INDEX", show_progress=False)
    built = time.process_time()
    index = bm25s.BM25.load(folder / "INDEX", mmap=True)
    opened = time.process_time()
    words = bm25s.tokenize(asked, stopwords=[], return_ids=False, show_progress=False)
    index.retrieve(words, k=10, show_progress=False, backend_selection="numpy")
    end = time.process_time()
    found = {"build": built - began, "open": opened - built, "query": (end - opened) / len(asked)}
    return found | {"bytes": _bytes(folder / "INDEX")}


def of_fts5(chunks: int, asked: list[str], folder: Path) -> dict[str, float]:
    """The same of SQLite."""
    said = list(texts(chunks))
    began = time.process_time()
    base = sqlite3.connect(folder / "INDEX")
    base.execute("create virtual table chunks using fts5(text)")
    base.executemany("insert into chunks values (?)", ((text,) for text in said))
    base.commit()
    built = time.process_time()
    order = "select rowid from chunks where chunks match ? order by bm25(chunks) limit 10"
    for query in asked:
        base.execute(order, (" OR ".join(query.split()),)).fetchall()
    end = time.process_time()
    found = {"build": built - began, "query": (end - built) / len(asked)}
    return found | {"bytes": _bytes(folder / "INDEX")}


def _bytes(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def table(chunks: int, found: dict[str, dict[str, float]]) -> str:
    """The columns as Markdown."""
    rows = [f"{chunks:,} chunks of {LENGTH} words:", ""]
    rows += [
        "| | build, s | one file of ten changed, s | open, s | a query, ms | memory, GB | on disk, GB |"
    ]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        seconds = [f"{one[key]:.1f}" if key in one else "" for key in ("build", "update", "open")]
        rest = [
            f"{1e3 * one['query']:.2f}",
            f"{one['peak'] / 1e9:.2f}",
            f"{one['bytes'] / 1e9:.2f}",
        ]
        rows.append(f"| {name} | {' | '.join([*seconds, *rest])} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measures each column in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--record", type=Path, help="where what was measured is kept")
    parser.add_argument("--column", choices=COLUMNS, help="this one alone, as JSON")
    options = parser.parse_args()
    if options.column:
        measure = {"jaxft": of_jaxft, "bm25s": of_bm25s, "fts5": of_fts5}[options.column]
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options.chunks, queries(options.queries), Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**found, "peak": peak}))
        return
    words = [sys.executable, __file__, "--chunks", str(options.chunks)]
    words += ["--queries", str(options.queries), "--column"]
    told: dict[str, dict[str, dict[str, float]]] = {}
    if options.record and options.record.exists():
        told = json.loads(options.record.read_text())
    found = told.setdefault(str(options.chunks), {})
    for name in COLUMNS:
        if name not in found:
            said = subprocess.run([*words, name], stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(said.stdout.splitlines()[-1])
        if options.record:
            options.record.write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(table(int(chunks), columns) for chunks, columns in told.items()))


if __name__ == "__main__":
    main()
