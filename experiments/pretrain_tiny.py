"""Pretrains the embedded base `jaxft/assets/tiny` on GSM8K (arXiv 2110.14168, MIT), on a CPU.

    python experiments/pretrain_tiny.py --data ../shared/data/gsm8k --output jaxft/assets/tiny

`--data` holds train.jsonl and test.jsonl with `question` and `answer`. The calculator's marks
`<<...>>` are taken out; every second problem stands behind the headings of the chat template, the
others are plain text. The script trains the tokenizer, then a llama of 3.5 million parameters.
pretrain_tiny.log is what it printed when it made the embedded base.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxft.data import Batches, Example, Tokenizer, load_tokenizer
from jaxft.formats import save
from jaxft.models import Config, Transformer, family_of, head_of, hidden_states, logits
from jaxft.models.transformer import initial_params
from jaxft.objectives.cross_entropy import cross_entropy
from jaxft.tree import map_with_paths
from jaxft.weights.base import Weight, weight

LENGTH = 512
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "Answer:{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}"
    "{% elif message.role == 'user' %}{{ 'Question: ' + message.content + '\\n' }}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
PROMPTS = (
    "Anna has 12 apples.",
    "A baker",
    "Question: Tom buys 3 pens for $2 each. How much does he pay?\nAnswer:",
)


def read_texts(path: Path) -> list[str]:
    """The problems with their solutions; every second one behind the headings."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = []
    for index, row in enumerate(rows):
        question, answer = row["question"].strip(), re.sub(r"<<.*?>>", "", row["answer"]).strip()
        texts.append(
            f"Question: {question}\nAnswer: {answer}" if index % 2 else f"{question}\n{answer}"
        )
    return texts


def write_tokenizer(folder: Path, texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE whose digits stand alone; writes all files but the weights."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    settings = SPECIAL | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    ids = {name: MODEL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"tokenizer_config": settings, "config": MODEL, "generation_config": ids}
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return load_tokenizer(folder)


def batches_of(tokenizer: Tokenizer, texts: list[str], rows: int, *, endless: bool) -> Batches:
    """Packed rows of LENGTH tokens: shuffled and without end, or in order and once."""
    examples = []
    for ids in tokenizer.encode_all(texts):
        tokens = np.asarray([*ids, MODEL["eos_token_id"]][:LENGTH], np.int32)
        examples.append(Example(tokens, np.ones(len(tokens), bool), ""))
    return Batches(
        examples,
        batch_size=rows,
        max_length=LENGTH,
        packing=True,
        shuffle=endless,
        seed=0,
        pad_id=tokenizer.pad_id,
        epochs=None if endless else 1,
    )


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, its factors rounded to bfloat16, its sums (and d kernel) in float32."""
    return _bfloat16_product("ti,io->to", x, kernel)


def _product_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    d_x = _bfloat16_product("to,io->ti", gradient, kernel)
    return d_x, jnp.einsum("...i,...o->io", x, gradient)


def _bfloat16_product(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    flat, kernel = x.reshape(-1, x.shape[-1]).astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y = jnp.einsum(letters, flat, kernel, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


@weight
class Rounded(Weight):
    """A kernel that multiplies by `product`: on CPUs with AMX several times as fast."""

    base: jax.Array

    def contract(self, x: jax.Array) -> jax.Array:
        """`x @ base`."""
        return product(x, self.base)

    def contract_transposed(self, x: jax.Array) -> jax.Array:
        """`x @ base.T`: the head."""
        return product(x, self.base.T)

    def materialize(self) -> jax.Array:
        """The kernel as it is: rows of the embedding are taken exactly."""
        return self.base


def rounded(params: Any) -> Any:
    """The tree with each matrix in a `Rounded`."""
    return map_with_paths(lambda path, x: x if path.endswith("scale") else Rounded(x), params)


def loss_sum(
    config: Config, params: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of a batch's targets, and how many there are."""
    hidden = hidden_states(config, params, batch["tokens"], batch["segments"], batch["positions"])
    targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    return cross_entropy(hidden[:, :-1], head_of(params), targets, weights)


def mean_loss(config: Config, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean over a batch's targets."""
    total, count = loss_sum(config, rounded(params), batch)
    return total / count


def evaluate(config: Config, params: Any, batches: Iterable[Any]) -> float:
    """The mean loss over all targets of the batches."""
    sums = [_loss_sum(config, params, batch) for batch in batches]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


def decaying(params: Any) -> Any:
    """Which leaves decay: the matrices."""
    return map_with_paths(lambda path, _: not path.endswith("scale"), params)


def optimizer_of(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """AdamW; the rate rises over 100 steps and falls by a cosine to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.1, mask=decaying)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def save_weights(folder: Path, config: Config, params: Any) -> None:
    """Writes model.safetensors in bfloat16; the old one stays until the new one is whole."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        save(Transformer(config), params, temporary, dtype="bfloat16")
        (Path(temporary) / "model.safetensors").replace(folder / "model.safetensors")


def continuation(
    config: Config, params: Any, tokenizer: Tokenizer, prompt: str, room: int = 80
) -> str:
    """The likeliest next token, again and again, without a cache."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    while len(ids) < start + room:
        row = jnp.asarray([ids + [tokenizer.pad_id] * (LENGTH - len(ids))])[:, :128]
        ids.append(int(_best_next(config, params, row, len(ids) - 1)))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids[start:])


_loss_sum = jax.jit(loss_sum, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _best_next(config: Config, params: Any, row: jax.Array, place: int) -> jax.Array:
    return logits(config, params, hidden_states(config, params, row))[0, place].argmax()


def main() -> None:
    """Trains, prints a line each 50 steps, and writes the folder every 500."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--output", type=Path, default=Path("jaxft/assets/tiny"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    flags = parser.parse_args()

    flags.output.mkdir(parents=True, exist_ok=True)
    train, test = (read_texts(flags.data / f"{name}.jsonl") for name in ("train", "test"))
    tokenizer = write_tokenizer(flags.output, train)
    batches = batches_of(tokenizer, train, flags.rows, endless=True)
    heldout = list(batches_of(tokenizer, test, 8, endless=False))
    config = family_of("llama", "config.json").read(MODEL)
    params = initial_params(config, jax.random.key(0))
    optimizer = optimizer_of(flags.steps, flags.learning_rate)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(functools.partial(mean_loss, config))(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    epoch = f"{batches.steps_per_epoch} steps an epoch, rows {batches.fill:.1%} full"
    print(f"{count} parameters; {epoch}")
    print(f"{flags.steps} steps; ln(vocabulary) {math.log(config.vocabulary):.3f}", flush=True)
    losses, tokens, began = [], 0, time.perf_counter()
    for number in range(1, flags.steps + 1):
        batch = next(batches)
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        tokens += int((batch["segments"] > 0).sum())
        if number % 50 == 0:
            seconds = time.perf_counter() - began
            line = f"step {number:5} loss {float(np.mean(jax.device_get(losses))):.4f}"
            print(f"{line} tokens {tokens:8} seconds {seconds:6.0f}", flush=True)
            losses = []
        if number % 500 == 0 or number == flags.steps:
            save_weights(flags.output, config, params)
            part = heldout if number == flags.steps else heldout[:4]
            print(f"step {number:5} held-out loss {evaluate(config, params, part):.4f}")
            for prompt in PROMPTS:
                said = continuation(config, params, tokenizer, prompt)
                print(f"  {prompt!r} -> {said!r}", flush=True)


if __name__ == "__main__":
    main()
