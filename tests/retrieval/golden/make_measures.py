"""Writes measures.json: rankings, grades, and what pytrec_eval (trec_eval) says of them.

    python make_measures.py        in an environment with pytrec_eval-terrier and numpy

Scores fall with the rank, so that trec_eval, which sorts again, has the same order.
"""

import json
from pathlib import Path

import numpy as np
import pytrec_eval

rng = np.random.default_rng(0)
rows, runs, grades = [], {}, {}
for query in range(40):
    names = [f"d{n}" for n in range(30)]
    ranking = [str(name) for name in rng.permutation(names)[: rng.integers(1, 30)]]
    some = rng.permutation(names)[: rng.integers(1, 12)]
    relevant = {str(name): int(rng.integers(0, 4)) for name in some}
    rows.append({"ranking": ranking, "relevant": relevant})
    runs[str(query)] = {name: 100.0 - place for place, name in enumerate(ranking)}
    grades[str(query)] = relevant
named = {"recall.1,4,10": "recall_", "ndcg_cut.10": "", "recip_rank": ""}
found = pytrec_eval.RelevanceEvaluator(grades, set(named)).evaluate(runs)
for query, row in enumerate(rows):
    row["expected"] = found[str(query)]
text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
Path(__file__).with_name("measures.json").write_text(text + "\n")
