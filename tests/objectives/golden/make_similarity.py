"""What NLTK 3.9 and RapidFuzz 3 say of pairs of texts: similarity.json, {measure: [[input, reference, value]]}.

NLTK's meteor is asked without stems and synonyms. Needs nltk and rapidfuzz.

    python tests/objectives/golden/make_similarity.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz import fuzz

FILE = Path(__file__).with_name("similarity.json")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "near",
    "police",
    "gunman",
    "killed",
    "was",
    "by",
    "today",
]
PLAIN = {
    "stemmer": SimpleNamespace(stem=lambda word: word),
    "wordnet": SimpleNamespace(synsets=lambda word: []),
}
MEASURES = {
    "fuzzy_match": lambda said, wanted: fuzz.ratio(said, wanted) / 100,
    "gleu": lambda said, wanted: sentence_gleu([wanted.split()], said.split()),
    "meteor": lambda said, wanted: single_meteor_score(wanted.split(), said.split(), **PLAIN),
}


def main() -> None:
    """Writes the file."""
    choose = random.Random(0)
    pairs = [
        [" ".join(choose.choices(WORDS, k=choose.randint(1, 12))) for _ in range(2)]
        for _ in range(20)
    ]
    found = {name: [[*pair, f(*pair)] for pair in pairs] for name, f in MEASURES.items()}
    FILE.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
