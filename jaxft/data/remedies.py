"""What to do about what is said of the examples."""

from __future__ import annotations

import numpy as np

from jaxft.data.store import Example
from jaxft.data.tokenizer import Tokenizer

# How jaxft's chat templates end what the assistant says; the last one by whatever the tokenizer's EOS is.
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": None}
NEAR = 3  # tokens about the end of an answer: its end, and a line's

LONGER = "a larger data.max_length keeps more of them"
EMPTY = "take them out, unless the model is to answer with nothing"
TWICE = "take the further ones out, unless they are meant to weigh more"
DOUBLED = "leave the BOS out of the rows or of the chat template: the tokenizer writes one"
FOREIGN = "train refuses them: take the model's own tokenizer"
HELD_OUT = "take them out of one of the two, or what is held out tells what was memorised"
ASKED_TWICE = "take them out of one of the two, unless both answers are wanted"
UNTRAINED = (
    "a larger data.max_length helps where the prompt fills it; the others have nothing to train on"
)
UNASKED = (
    "an answer to nothing teaches nothing about questions: take them out, or fill in what was asked"
)
SAME = "take them out"
REVERSED = "keep the one that is meant"
SPACE = "a space at the prompt's end belongs at the completion's beginning"


def ending(tokenizer: Tokenizer, example: Example) -> str:
    """How to make answers end, by what stands where the example's last answer ends."""
    last = int(np.flatnonzero(example.trained)[-1])
    after = example.tokens[last + 1 : last + NEAR].tolist()
    eos = tokenizer.special_tokens.get("eos_token", "an EOS")
    if set(after) & set(tokenizer.eos_ids):
        return f"the chat template writes {eos} outside of {{% generation %}}: it belongs inside, after the answer"
    added = tokenizer.backend.get_added_tokens_decoder()
    near = [*example.tokens[max(last + 1 - NEAR, 0) : last + 1].tolist()[::-1], *after]
    for token in near:
        if token in added:
            text = added[token].content
            return f"an answer ends with {text}: name that as eos_token in tokenizer_config.json (now {eos})"
    fits = [
        name
        for name, text in ENDS.items()
        if text is None or tokenizer.backend.token_to_id(text) in tokenizer.eos_ids
    ]
    return (
        f"let the chat template write {eos} after each answer, inside of {{% generation %}} if it has that, or take "
        f"config.data.chat_template={fits[0]}"
    )
