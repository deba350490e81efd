"""Ask the reference libraries whether a folder loads whole and gives the logits expected of it.

    python tests/golden/check_written.py BASE ADAPTER EXPECTED.npz     (PeftModel.from_pretrained)
    python tests/golden/check_written.py --model FOLDER EXPECTED.npz   (AutoModelForCausalLM)

EXPECTED.npz holds input_ids (batch, length) and logits (batch, length, vocabulary) and may hold
attention_mask and position_ids; places with mask 0 are not compared. Prints the largest deviation
relative to the largest logit. Exits 1 if that is above TOLERANCE, if a tensor of the file was
missing, unexpected, of another shape or not taken over bit for bit, or if a warning said so.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-4
GRAVE = re.compile(r"missing|unexpected|mismatch|newly initialized|not (used|initialized)", re.I)


class Collect(logging.Handler):
    """Keeps what the libraries log at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def load_base(folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """The model in float32 and a line for each kind of key that did not fit."""
    model, information = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    problems = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in information.items() if keys]
    return model.eval(), problems


def load_adapter(base: torch.nn.Module, folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """PEFT's model and a line for each tensor that the file lacks, has too many of, or lost.

    PEFT may keep an embedding's base weight beside its adapter, adapted or not: that one is optional.
    """
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    stored = load_peft_weights(str(folder), device="cpu")
    wanted = get_peft_model_state_dict(model)
    missing = [name for name in wanted if name not in stored and ".base_layer." not in name]
    strange = [name for name in stored if name not in wanted and name not in model.state_dict()]
    lost = [
        name
        for name, tensor in stored.items()
        if name in wanted and not torch.equal(tensor.float(), wanted[name].float())
    ]
    found = {"missing": missing, "unexpected": strange, "not loaded as stored": lost}
    return model, [f"{kind}: {names}" for kind, names in found.items() if names]


@torch.no_grad()
def deviation(model: torch.nn.Module, file: Path) -> float:
    """Largest difference of the logits from those in `file`, relative to the largest logit."""
    expected = np.load(file)
    names = [name for name in ("attention_mask", "position_ids") if name in expected]
    inputs = {
        name: torch.from_numpy(expected[name].astype(np.int64)) for name in ("input_ids", *names)
    }
    logits = model(**inputs).logits.float().numpy()
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).numpy() > 0
    difference = np.abs(logits - expected["logits"])[seen].max()
    return float(difference / np.abs(expected["logits"][seen]).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="store_true", help="a whole model, no adapter")
    parser.add_argument("paths", nargs="+", type=Path, metavar="BASE [ADAPTER] EXPECTED_NPZ")
    arguments = parser.parse_args()
    if len(arguments.paths) != (2 if arguments.model else 3):
        parser.error("give --model FOLDER EXPECTED_NPZ, or BASE ADAPTER EXPECTED_NPZ")
    disable_progress_bar()
    collect = Collect()
    for library in ("transformers", "peft"):
        logging.getLogger(library).addHandler(collect)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, problems = load_base(arguments.paths[0])
        if not arguments.model:
            model, more = load_adapter(model, arguments.paths[1])
            problems += more
    said = collect.messages + [str(warning.message) for warning in caught]
    problems += [f"warning: {message}" for message in said if GRAVE.search(message)]
    difference = deviation(model, arguments.paths[-1])
    for problem in problems:
        print(problem)
    print(f"largest deviation {difference:.2e} of the largest logit")
    return int(bool(problems) or not difference <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
