"""Supervised fine-tuning: every key there is, its meaning and its default, which lives here alone.

`configs/sft.py:dora` passes `dora` to `get_config`. Each key can be set on the command line, as in
`--config.optimizer.learning_rate=1e-4`; the type of the default below is the type it takes. Numbers
that TRL and transformers have as well are theirs. An empty text, tuple or dict, and 0 where it is
said, mean "none".
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxft.methods import defaults

# Full tuning moves every weight and wants small steps; VeRA's few scaling vectors want large ones.
LEARNING_RATES = {"full": 2e-5, "vera": 4e-3}
ADAPTER_LEARNING_RATE = 2e-4


def section(**keys: Any) -> ConfigDict:
    """A group of keys. A dict in it stays a plain one: its keys are the user's, in their order."""
    return ConfigDict(keys, convert_dict=False)


def get_config(method: str = "lora") -> ConfigDict:
    """The whole configuration of a run that tunes with `method`, a row of `jaxft.methods`.

    `qlora` is lora over a base in nf4.
    """
    method, scheme = ("lora", "nf4") if method == "qlora" else (method, "none")
    return ConfigDict(
        {
            "model": "tiny",  # a Hugging Face folder, or "tiny": the small base embedded in jaxft
            "tokenizer": "",  # a folder with another tokenizer.json; "": the model's
            "dtype": "auto",  # of the computation: float32 | bfloat16 | auto: bfloat16 on a TPU and on a
            # GPU from Ampere on, float32 elsewhere
            "param_dtype": "auto",  # of the weights in memory, the same; auto: float32 if they train
            "base": section(
                quantize=scheme,  # the frozen projections: none | nf4 | fp4 | int4 | int8
                group_size=64,  # weights along the input axis that share a scale; -1: all of them
                double_quant=True,  # nf4 and fp4: quantize the scales too
            ),
            "adapter": "",  # a PEFT folder to go on from: its rank, alpha and targets then hold
            "seed": 42,  # of the adapter's start, the data's order and dropout
            "method": section(name=method, **defaults(method)),  # documented in jaxft/methods.py
            "objective": objective(),
            "data": data(),
            "optimizer": optimizer(LEARNING_RATES.get(method, ADAPTER_LEARNING_RATE)),
            "batch_size": 8,  # sequences an update, over all devices and accumulated parts
            "eval_batch_size": 8,  # sequences at once in evaluation, over all devices
            "grad_accum": 1,  # parts of a batch taken one after the other, to save memory
            "steps": 0,  # updates; 0: as many as `epochs` takes
            "epochs": 3.0,  # passes over the training data, where `steps` is 0
            "mesh": section(
                data=-1,  # devices among which the batch is divided; -1 takes those that are left
                fsdp=1,  # devices among which batch and weights are divided
                context=1,  # devices among which each sequence is divided (long rows)
                tensor=1,  # devices among which each projection is divided
            ),
            "remat": "none",  # recomputed: none | dots: not products | outputs: not attention and feed-forward | full
            "checkpoint": section(
                every=500,  # updates between two checkpoints; 0: at the end alone
                keep=2,  # how many of the last checkpoints stay
                asynchronous=True,  # write while training goes on
                local="",  # a folder on each host's own disk, for the newest state between those; "": none
                local_every=50,  # updates between two states there
                best=False,  # keep the one of lowest held-out loss too, and export it, not the last
            ),
            "eval_every": 500,  # updates between two evaluations; 0: at the end alone
            "eval_metrics": (),  # of answers, or of what stands in the rows, at each evaluation: exact, bleu, ...:
            # any that `jaxft evaluate` has
            "eval_rows": 64,  # held-out rows on which they are computed, spread over the first set
            "patience": 0,  # evaluations without a lower held-out loss, after which it stops; 0: never
            "log_every": 1,  # updates between two lines of metrics.jsonl
            "samples": section(
                count=3,  # held-out prompts that are answered at each evaluation; 0: none
                max_new_tokens=64,  # length of an answer, at most; answers are greedy, also for eval_metrics
            ),
            "report_to": (),  # beside metrics.jsonl: tensorboard, wandb, trackio, mlflow
            "population": (),  # runs that train together over one base, each a mapping of what it has of its own:
            # '[{"optimizer.learning_rate": 1e-4}, {"name": "b", "method.rank": 4}]'; or a grid of all
            # combinations: '{"optimizer.learning_rate": [1e-4, 3e-4], "seed": [1, 2]}'; (): a single run
        }
    )


def objective() -> ConfigDict:
    """What is minimised."""
    return section(
        name="sft",  # cross entropy of the next token
        label_smoothing=0.0,  # share of the target's probability that is spread over the vocabulary
    )


def data() -> ConfigDict:
    """Where the examples come from, and how they become rows of tokens."""
    return section(
        train="",  # file, folder, glob, URL or tfds:NAME[:SPLIT], or several with commas; to be given
        eval="",  # the same, of held-out examples; "": no evaluation; or {"name": file, ...}: several
        # sets, the first of which decides what is best
        format="auto",  # prompt_completion | messages | text | alpaca | sharegpt | auto: by the keys
        fields={},  # the format's keys by their names in the data, as {"prompt": "question", ...}
        ignore=(),  # keys of the rows that are left out: text that is not used is an error otherwise
        mix=(),  # weights of the sources of `train`, as 3,1: what examples are drawn of; (): all once
        max_length=0,  # tokens in a row, longer examples are cut and counted; 0: 1024, or the model's
        packing=False,  # fill a row with several examples that do not see each other
        shuffle=True,  # another order in each epoch, always the same from the same seed
        chat_template="",  # "": the tokenizer's; a file, a name (chatml, llama3, ...), or the template
        date="",  # what a chat template takes for the present moment: 2024-02-29, or 2024-02-29T08:30; "":
        # the day on which the run starts, which RUN/config.json then holds
        add_tokens=(),  # texts that are to be tokens: those that the tokenizer lacks are added to it, with rows in the
        # embedding and the head; the rows of all of them train, and the tokenizer goes with the adapter
        loss_on="completion",  # completion (of messages: the assistant's turns) | all
        on_unwritten="warn",  # what the chat template leaves out of messages: warn (count it) | error
        retrieve="",  # an index: passages stand before each row's question, as `--retrieve` puts them; "": none
        retrieve_passages=4,  # passages of a row, at most
        retrieve_oracle=0.8,  # share of training rows that have the passage of their answer among them (RAFT's P)
        retrieve_template="",  # a file, or a text with {passages} and {question}; "": jaxft's
    )


def optimizer(learning_rate: float) -> ConfigDict:
    """How the trainable leaves are updated."""
    return section(
        name="adamw",  # or any optimizer of Optax that takes a learning rate
        learning_rate=learning_rate,  # the highest rate of the schedule
        schedule="linear",  # what follows the warm-up: linear | cosine | constant | wsd
        warmup_steps=0,  # updates over which the rate rises in a line from 0
        decay_steps=0,  # wsd: the last updates, over which the rate falls; 0: a tenth of all
        final_fraction=0.0,  # the rate at the end, as a fraction of the highest
        weight_decay=0.0,  # decoupled, times the rate
        decay=(  # (pattern of paths, whether they decay), the first match wins
            ("bias", False),
            ("scale", False),  # of a norm
            ("*", True),
        ),
        max_bad_steps=8,  # in a row, skipped for a loss or gradient that is not finite; then it stops
        clip_norm=1.0,  # the gradient's global norm is cut to this; 0.0: never
        b1=0.9,  # adamw: decay of the mean of the gradients
        b2=0.999,  # adamw: decay of the mean of their squares
        epsilon=1e-8,  # adamw: added to the root of the latter
        options={},  # other arguments of the Optax function, as in {"momentum": 0.9} for sgd
    )
