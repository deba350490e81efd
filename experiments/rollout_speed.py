"""Rollouts beside transformers' `generate` and Tunix's sampler: tokens a second of G completions of each prompt.

    python experiments/rollout_speed.py --reference-python PATH --tunix-python PATH [--prompts 8] [--rounds 1]
        [--threads 1] [--record]

SmolLM2-135M's shape with random weights (float32), prompts of 256 tokens, groups of 8, temperature 1. How long a
completion becomes is drawn beforehand, the same for both: exponential lengths of mean 80, at most 256. Each column is a
process of its own; they take turns in every round, after a short warm-up that compiles what there is to compile. Both
are given as many threads, on as many processors; what counts is the processor time of the process, as wall times depend
on what else the machine does. Tokens are those of the completions, without prompts and padding.

jaxft is `sample_rollouts`: a prompt read once, slots refilled. transformers is `model.generate` of all completions as
one batch, with its cache, `num_return_sequences` and a stopping criterion that ends each row at its length. Tunix is
its `Sampler` (the "vanilla" one of its rollouts) with its own Llama: a batch in which each prompt stands G times, as
its GRPO asks for it. It ends when its last row does, which is what the longest of the lengths is; what its rows write
beyond their lengths is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GROUP, PROMPT, NEW, MEAN = 8, 256, 256, 80
GOAL = 3.0
COLUMNS = {
    "jaxft": "jaxft's rollouts",
    "transformers": "transformers' `generate`",
    "tunix": "Tunix's sampler",
}


def lengths_of(prompts: int) -> Any:
    """(prompts, group) tokens of each completion."""
    import numpy as np

    drawn = np.random.RandomState(0).exponential(MEAN, (prompts, GROUP))
    return np.clip(np.ceil(drawn), 1, NEW).astype(np.int32)


def prompts_of(count: int) -> Any:
    """(prompts, 256) token ids."""
    import numpy as np

    return np.random.RandomState(1).randint(0, 49152, (count, PROMPT)).astype(np.int32)


def jaxft_worker(slots: int) -> Any:
    """(prompts, lengths, longest) -> what was found."""
    import jax
    import numpy as np

    from experiments.speed import shape_of
    from jaxft.inference.rollouts import sample_rollouts
    from jaxft.models.transformer import initial_params

    config = shape_of()
    params = jax.jit(lambda key: initial_params(config, key))(jax.random.key(0))

    def run(prompts: Any, lengths: Any) -> dict[str, Any]:
        settings = {"group": GROUP, "max_new_tokens": NEW, "limits": lengths, "slots": slots}
        mask = np.ones_like(prompts)
        found = sample_rollouts(config, params, prompts, mask, jax.random.key(0), **settings)
        assert (found.lengths == lengths.reshape(-1)).all()
        return {"tokens": int(found.lengths.sum()), "busy": found.busy}

    return run


def transformers_worker(threads: int) -> Any:
    """The same by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation import StoppingCriteria

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True, **sizes, **heads)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None

    class Planned(StoppingCriteria):
        """Ends each row at its length."""

        def __init__(self, ends: Any) -> None:
            self.ends = ends

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    def run(prompts: Any, lengths: Any) -> dict[str, Any]:
        ids = torch.tensor(prompts, dtype=torch.long)
        ends = torch.tensor(lengths.reshape(-1)) + ids.shape[1]
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=GROUP,
                max_new_tokens=NEW,
                pad_token_id=0,
                stopping_criteria=[Planned(ends)],
            )
        return {"tokens": int(lengths.sum())}

    return run


def tunix_worker() -> Any:
    """The same by Tunix."""
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import Llama3, ModelConfig

    class Numbers:
        """A tokenizer for which a text is its token ids with spaces between; no id ends or pads."""

        encode = staticmethod(lambda text: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids: " ".join(map(str, ids)))
        bos_id = staticmethod(lambda: 0)  # Tunix takes 0 for none
        eos_id = pad_id = staticmethod(lambda: -1)

    sizes = {"num_layers": 30, "vocab_size": 49152, "embed_dim": 576, "hidden_dim": 1536}
    heads = {"num_heads": 9, "head_dim": 64, "num_kv_heads": 3}
    others = {"rope_theta": 10000, "norm_eps": 1e-5, "weight_tying": True}
    model = Llama3(ModelConfig(**sizes, **heads, **others), rngs=nnx.Rngs(0))
    sampler = Sampler(model, Numbers(), CacheConfig(PROMPT + NEW, 30, 3, 64))

    def run(prompts: Any, lengths: Any) -> dict[str, Any]:
        texts = [" ".join(map(str, row)) for row in prompts for _ in range(GROUP)]
        longest = int(lengths.max())
        settings = {"max_prompt_length": PROMPT, "temperature": 1.0, "top_p": 1.0, "seed": 0}
        found = sampler(texts, max_generation_steps=longest, pad_output=True, **settings)
        assert {len(row) for row in found.tokens} == {longest}
        return {"tokens": int(lengths.sum())}

    return run


def work(column: str, prompts: int, threads: int, slots: int) -> None:
    """A process: warms up, then runs whenever a line comes, and answers with a line."""
    asked, lengths = prompts_of(prompts), lengths_of(prompts)
    few = lengths.clip(max=2)
    # a compiled program is one for its shapes: the prompts and, for Tunix, the longest length
    makers = {
        "jaxft": (lambda: jaxft_worker(slots), asked, few),
        "transformers": (lambda: transformers_worker(threads), asked[:1], few[:1]),
        "tunix": (tunix_worker, asked, lengths),
    }
    make, *warm = makers[column]
    run = make()
    run(*warm)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        found = run(asked, lengths)
        found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


def started(column: str, arguments: Any) -> subprocess.Popen[str]:
    """The worker of a column, on the first processors of the machine."""
    pythons = {"transformers": arguments.reference_python, "tunix": arguments.tunix_python}
    python = pythons.get(column, sys.executable)
    command = [python, __file__, "--worker", column]
    command += [f"--prompts={arguments.prompts}", f"--threads={arguments.threads}"]
    command += [f"--slots={arguments.slots}"]
    processors = set(sorted(os.sched_getaffinity(0))[: arguments.threads])
    one = " --xla_cpu_multi_thread_eigen=false" if arguments.threads == 1 else ""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(arguments.threads),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + one,
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, processors),
        **pipes,
    )


def answer(worker: subprocess.Popen[str]) -> str:
    """The next line that a worker says."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a worker ended")
    return line


def main() -> None:
    """Runs the columns in turns and tells, or records, what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference-python", default=sys.executable, help="has transformers")
    parser.add_argument("--tunix-python", default=sys.executable, help="has google-tunix")
    for name, default in (("prompts", 8), ("rounds", 1), ("threads", 1), ("slots", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", default="")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.prompts, arguments.threads, arguments.slots)
        return
    workers = {column: started(column, arguments) for column in COLUMNS}
    for worker in workers.values():
        assert answer(worker).strip() == "ready"
    rounds = []
    for _ in range(arguments.rounds):
        found = {}
        for column, worker in workers.items():
            assert worker.stdin is not None
            print("go", file=worker.stdin, flush=True)
            found[column] = json.loads(answer(worker))
            print(column, found[column], flush=True)
        rounds.append(found)
    for worker in workers.values():
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    tell(arguments, rounds)


def tell(arguments: Any, rounds: list[dict[str, Any]]) -> None:
    """The rates and their ratio; with --record in rollout_speed.json and rollout_speed.md."""
    rates = {
        column: max(found[column]["tokens"] / found[column]["cpu"] for found in rounds)
        for column in COLUMNS
    }
    # the completions are the same ones, so that a ratio of rates is one of times
    lines = "\n".join(
        f"| {name} | {rates[column]:.1f} | "
        f"{min(found[column]['cpu'] / found['jaxft']['cpu'] for found in rounds):.2f} x |"
        for column, name in COLUMNS.items()
    )
    lengths = lengths_of(arguments.prompts)
    text = f"""# Rollouts beside transformers' `generate` and Tunix's sampler

`experiments/rollout_speed.py --prompts {arguments.prompts} --threads {arguments.threads} --rounds {arguments.rounds}`:
SmolLM2-135M's shape, float32, {arguments.prompts} prompts of {PROMPT} tokens, groups of {GROUP}, lengths
of mean {lengths.mean():.0f} and at most {NEW} (the longest {lengths.max()}). Tokens of completions for a second of
processor time, the best of the rounds; the machine had other work.

| | tokens a second | times what jaxft's take |
|---|---|---|
{lines}

The goal is {GOAL} x. Of the slot-steps {100 * rounds[-1]["jaxft"]["busy"]:.1f} % continued a completion.
"""
    print(text)
    if arguments.record:
        here = ROOT / "experiments"
        (here / "rollout_speed.md").write_text(text)
        kept = {
            "settings": vars(arguments) | {"reference_python": "", "tunix_python": ""},
            "rounds": rounds,
        }
        (here / "rollout_speed.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
