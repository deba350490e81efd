"""How `jaxft serve` holds: its speed with many adapters, PEFT beside it, real clients, and hundreds of them at once.

    python experiments/serving.py adapters --model smollm --work WORK [--count 64]
    python experiments/serving.py speed    --model smollm --work WORK [--rows 64] [--new 32]
    python experiments/serving.py peft     --model smollm --work WORK [--rows 64] [--new 32]      (extra `reference`)
    python experiments/serving.py clients  --url http://127.0.0.1:8000/v1 --name NAME             (openai, curl)
    python experiments/serving.py lm_eval  --url ... --name NAME --model smollm --work WORK    (lm-eval, transformers)
    python experiments/serving.py load     --url ... --name NAME --process PID [--clients 200] [--seconds 600]

`adapters` makes LoRA adapters of rank 8 over all projections with drawn numbers, so that each says something else.
`speed` runs the server's engine without HTTP: rows that are all of the base, in a program without a bank and in one
with it, and rows of an adapter each, in turns, several times in one process; what is timed is drawing, as the prompts
stand in the slots. `peft` gives the same rows to one batch of PEFT, whose `adapter_names` says each row's adapter,
timed in the same way, and then does as `speed`. `load` asks like many users do: chats and texts, streams that are read
slowly or cut, answers that are dropped, bad JSON, bodies that are too large; it checks that greedy answers stay what
they were, and writes down the memory of the server's process.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RANK = 8
TEXT = "the old town by the river has a market where people meet to talk about the weather and the harvest"
WORDS = TEXT.split()


def prompts_of(rows: int, vocabulary: int, length: int = 24) -> list[list[int]]:
    """Token ids of each row, which differ."""
    draw = random.Random(0)
    return [[draw.randrange(10, vocabulary) for _ in range(length)] for _ in range(rows)]


def make_adapters(model: str, work: Path, count: int) -> None:
    """Folders WORK/adapters/NUMBER."""
    import jax

    import jaxft

    method = jaxft.methods.lora(rank=RANK, targets=("all-linear",))
    _, params = jaxft.load(model)
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    trainable, frozen = jaxft.partition(adapted, method)
    leaves, structure = jax.tree.flatten(trainable)
    for number in range(count):
        keys = jax.random.split(jax.random.key(number), len(leaves))
        moved = [
            0.1 * jax.random.normal(key, x.shape, x.dtype)
            for x, key in zip(leaves, keys, strict=True)
        ]
        tree = jaxft.combine(jax.tree.unflatten(structure, moved), frozen)
        jaxft.save_adapter(tree, work / "adapters" / str(number))


class Engines:
    """Rows asked of the server's engine, without HTTP: one engine for each case, which then finds its prompts read.

    Attributes:
        cases: {name: how an ask of each row is answered}.
    """

    def __init__(self, model: str, work: Path, rows: int, new: int) -> None:
        from jaxft.assets import model_folder
        from jaxft.data.tokenizer import load_tokenizer
        from jaxft.inference.serving.command import engine_of
        from jaxft.inference.serving.versions import Room, bank_of, open_base

        folders = {str(n): str(work / "adapters" / str(n)) for n in range(rows)}
        network, params, found = open_base(model, folders, "float32")
        bank = bank_of(params, found, Room())
        self.rows, self.new, self.tokenizer = rows, new, load_tokenizer(model_folder(model))
        self.prompts = prompts_of(rows, network.config.vocabulary)
        none, own = [-1] * rows, list(range(rows))
        self.cases = {
            "base": (None, none),
            "base in a bank": (bank, none),
            "adapters": (bank, own),
        }
        sizes = {"slots": rows, "context": 64, "waiting": rows}
        self.engines = {
            name: engine_of(network.config, params, tree, **sizes)
            for name, (tree, _) in self.cases.items()
        }

    def answer(self, name: str) -> tuple[float, float]:
        """Seconds, and those of the processor, until all rows are answered."""
        from jaxft.inference.serving.engine import Ask

        left, done = [self.rows], threading.Event()

        def tell(piece: Any) -> None:
            left[0] -= bool(piece.end)
            if not left[0]:
                done.set()

        asks = [
            Ask(ids=tuple(ids), tokenizer=self.tokenizer, limit=self.new, adapter=adapter)
            for ids, adapter in zip(self.prompts, self.cases[name][1], strict=True)
        ]
        start, spent = time.monotonic(), time.process_time()
        self.engines[name].submit(asks, [tell] * self.rows)
        done.wait()
        return time.monotonic() - start, time.process_time() - spent

    def measure(self, rounds: int) -> dict[str, dict[str, float]]:
        """Tokens a second of each case, the best of some rounds in which they take turns."""
        seconds: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        for engine in self.engines.values():
            engine.start()
        for turn in range(rounds + 1):
            for name in self.cases:
                taken = self.answer(name)
                if turn:  # the first compiles, and reads the prompts
                    seconds[name].append(taken)
        for engine in self.engines.values():
            engine.stop()
        return {name: _speed(self.rows * self.new, taken) for name, taken in seconds.items()}


def _speed(tokens: int, taken: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "tokens_per_second": round(tokens / min(wall for wall, _ in taken), 1),
        "tokens_per_cpu_second": round(tokens / min(cpu for _, cpu in taken), 1),
    }


def measure_speed(model: str, work: Path, rows: int, new: int, rounds: int) -> None:
    """Tokens a second of the engine: without a bank, the base in a bank, and an adapter a row."""
    report = Engines(model, work, rows, new).measure(rounds)
    _write(work, "speed", {"rows": rows, "new": new, **report})


def measure_peft(model: str, work: Path, rows: int, new: int, rounds: int) -> None:
    """The same rows in one batch of PEFT, and then in the engine."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = torch.tensor(prompts_of(rows, network.config.vocab_size))
    given: dict[str, Any] = {
        "input_ids": prompts,
        "attention_mask": torch.ones_like(prompts),
        "do_sample": False,
        "pad_token_id": 0,
    }

    def seconds(model: Any, count: int, **options: Any) -> tuple[float, float]:
        start, spent = time.monotonic(), time.process_time()
        with torch.no_grad():
            model.generate(**given, max_new_tokens=count, min_new_tokens=count, **options)
        return time.monotonic() - start, time.process_time() - spent

    def timed(model: Any, **options: Any) -> dict[str, float]:
        """Of the tokens behind the first, which is drawn where the prompts are read."""
        taken = []
        for _ in range(rounds):
            first, whole = (seconds(model, count, **options) for count in (1, new + 1))
            taken.append((whole[0] - first[0], whole[1] - first[1]))
        return _speed(rows * new, taken)

    report = {"PEFT, base": timed(network)}
    names = [str(number) for number in range(rows)]
    adapted = PeftModel.from_pretrained(network, work / "adapters" / "0", adapter_name="0")
    for name in names[1:]:
        adapted.load_adapter(work / "adapters" / name, adapter_name=name)
    adapted.eval()
    report["PEFT, adapters"] = timed(adapted, adapter_names=names)
    report |= Engines(model, work, rows, new).measure(rounds)
    _write(work, "peft", {"rows": rows, "new": new, **report})


def ask_as_clients(url: str, name: str, key: str) -> None:
    """openai-python and curl get the answers, the streams, the probabilities and the errors that they expect."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0)
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).object == "model"
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    settings: Any = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    parts = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == text, (said, text)
    assert (
        parts[-1].usage == whole.usage or parts[-1].usage.total_tokens == whole.usage.total_tokens
    )
    plain = client.completions.create(
        model=name, prompt="The sea is", max_tokens=5, temperature=0, logprobs=3, echo=True, n=1
    )
    assert plain.choices[0].text.startswith("The sea is")
    assert plain.choices[0].logprobs.token_logprobs[0] is None
    two = client.completions.create(model=name, prompt=["A", "B"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    stream = client.completions.create(
        model=name, prompt=[5, 6, 7], max_tokens=4, temperature=0, stream=True
    )
    assert sum(len(part.choices) for part in stream) >= 1
    for wrong, kind in (
        ({"model": name + "x"}, openai.NotFoundError),
        ({"max_tokens": 10**6, "prompt": "a " * 10**5}, openai.BadRequestError),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError),
    ):
        try:
            client.completions.create(**{"model": name, "prompt": "A", **wrong})
        except kind as error:
            print(f"{kind.__name__}: {error.body['message']}")  # type: ignore[index]
        else:
            raise AssertionError(f"{wrong} was answered")
    body = json.dumps({**settings, "stream": True})
    command = [
        "curl",
        "-sN",
        f"{url}/chat/completions",
        "-d",
        body,
        "-H",
        f"Authorization: Bearer {key}",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    got = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(part.get("content", "") for part in got) == text
    print(f"openai {openai.__version__} and curl: {text!r}")


DOCUMENTS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a river"], "gold": 0},
    {"question": "Water freezes at", "choices": ["zero degrees", "noon", "the station"], "gold": 0},
    {"question": "A cat is an", "choices": ["engine", "animal", "island"], "gold": 1},
]


def evaluate_by_lm_eval(url: str, name: str, model: str, work: Path) -> None:
    """lm-eval's `local-completions` gets from the server what lm-eval computes of the folder in transformers."""
    from lm_eval import simple_evaluate

    data = work / "documents.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str(work.resolve()),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }
    said = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
    }
    tasks = []
    for task, own in (("choice", choice), ("said", said)):
        file = work / f"{task}.yaml"
        file.write_text(json.dumps({"task": task, **shared, **own}))
        tasks.append(str(file))
    settings: Any = {"tasks": tasks, "bootstrap_iters": 0, "log_samples": True}
    server = (
        f"model={name},base_url={url}/completions,tokenizer={model},num_concurrent=4,max_retries=1"
    )
    ours = simple_evaluate(model="local-completions", model_args=server, **settings)
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", device="cpu", **settings
    )
    gap = 0.0
    for one, other in zip(ours["samples"]["choice"], theirs["samples"]["choice"], strict=True):
        for (a, likeliest), (b, also) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert likeliest == also
            gap = max(gap, abs(a - b))
    answers = [
        [one["filtered_resps"][0] for one in found["samples"]["said"]] for found in (ours, theirs)
    ]
    assert answers[0] == answers[1], answers
    print(f"lm-eval: log-likelihoods differ by {gap:.1e} at most; {answers[0]}")


class Load:
    """Clients that ask what they like for some time, and what came of it."""

    def __init__(self, url: str, names: list[str], process: int, key: str) -> None:
        import httpx

        self.url, self.names, self.process = url, names, process
        self.client = httpx.Client(
            timeout=300,
            headers={"Authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_connections=None),
        )
        self.counts: collections.Counter[str] = collections.Counter()
        self.known: dict[str, str] = {}
        self.memory: list[tuple[float, int]] = []
        self.lock = threading.Lock()

    def body(self, draw: random.Random, **others: Any) -> dict[str, Any]:
        """A text of a few words, answered greedily so that each answer can be checked."""
        prompt = " ".join(draw.choice(WORDS) for _ in range(draw.choice((3, 5, 8))))
        name = draw.choice(self.names)
        return {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, **others}

    def check(self, body: dict[str, Any], text: str) -> str:
        """Whether an answer is what was said to the same before."""
        asked = json.dumps([body["model"], body["prompt"], body["max_tokens"]])
        with self.lock:
            return "right" if self.known.setdefault(asked, text) == text else "WRONG"

    def plain(self, draw: random.Random) -> str:
        few = random.Random(draw.randrange(40))  # of few kinds, so that each is asked often
        body = self.body(few)
        response = self.client.post(f"{self.url}/completions", json=body)
        if response.status_code == 429:
            time.sleep(min(int(response.headers["retry-after"]), 5))
            return "429"
        if response.status_code != 200:
            return f"status {response.status_code}"
        return self.check(body, response.json()["choices"][0]["text"])

    def stream(self, draw: random.Random, pause: float = 0.0, cut: bool = False) -> str:
        body = self.body(random.Random(draw.randrange(40)), stream=True)
        text = ""
        with self.client.stream("POST", f"{self.url}/completions", json=body) as response:
            if response.status_code == 429:
                return "429"
            for count, line in enumerate(response.iter_lines()):
                if cut and count > draw.randrange(4):
                    return "cut"
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    time.sleep(pause)
        return self.check(body, text)

    def slow(self, draw: random.Random) -> str:
        return self.stream(draw, pause=0.3)

    def cut(self, draw: random.Random) -> str:
        return self.stream(draw, cut=True)

    def dropped(self, draw: random.Random) -> str:
        import httpx

        try:
            body = self.body(draw, max_tokens=100, ignore_eos=True)
            self.client.post(f"{self.url}/completions", json=body, timeout=draw.random() * 2)
        except httpx.TimeoutException:
            return "dropped"
        return "answered"

    def wrong(self, draw: random.Random) -> str:
        bad = draw.choice([b"{", b"[" * 10_000, b"\xff\xfe", b'{"model": NaN}', b"x" * (2**22 + 1)])
        status = self.client.post(f"{self.url}/completions", content=bad).status_code
        return f"refused {status}" if status in (400, 413) else f"status {status}"

    def user(self, number: int, until: float) -> None:
        """One client until the end."""
        import httpx

        draw = random.Random(number)
        kinds = (
            [self.plain] * 6 + [self.stream] * 4 + [self.slow, self.cut, self.dropped, self.wrong]
        )
        while time.monotonic() < until:
            kind = draw.choice(kinds)
            try:
                came = kind(draw)
            except httpx.HTTPError as error:
                came = type(error).__name__
            with self.lock:
                self.counts[f"{kind.__name__}: {came}"] += 1

    def watch(self, until: float) -> None:
        """The resident memory of the server, every few seconds."""
        start = time.monotonic()
        while time.monotonic() < until:
            status = Path(f"/proc/{self.process}/status").read_text()
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            self.memory.append((time.monotonic() - start, int(resident.split()[1]) // 1024))
            time.sleep(5)


def put_under_load(
    url: str, names: list[str], process: int, key: str, clients: int, seconds: float, work: Path
) -> None:
    """Asks for some time, and writes down what came."""
    load, until = Load(url, names, process, key), time.monotonic() + seconds
    with ThreadPoolExecutor(clients + 1) as pool:
        futures = [pool.submit(load.watch, until)]
        futures += [pool.submit(load.user, number, until) for number in range(clients)]
    for future in futures:
        future.result()
    time.sleep(3)
    state = load.client.get(url.removesuffix("/v1") + "/health").json()
    third = len(load.memory) // 3
    report = {
        "clients": clients,
        "seconds": seconds,
        "came": dict(sorted(load.counts.items())),
        "kinds_of_answers": len(load.known),
        "memory_mib": {
            "after a third": max(size for _, size in load.memory[:third] or load.memory),
            "at the end": load.memory[-1][1],
        },
        "after": state,
    }
    _write(work, "load", report)
    assert not any("WRONG" in name for name in load.counts)
    assert state["busy"] == state["waiting"] == 0, state


def _write(work: Path, name: str, report: dict[str, Any]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("adapters", "speed", "peft", "clients", "lm_eval", "load"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("serving"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--name", action="append", default=[])
    parser.add_argument("--key", default="none")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    sizes = (given.model, given.work, given.rows, given.new, given.rounds)
    if given.part == "adapters":
        make_adapters(given.model, given.work, given.count)
    elif given.part == "speed":
        measure_speed(*sizes)
    elif given.part == "peft":
        measure_peft(*sizes)
    elif given.part == "lm_eval":
        evaluate_by_lm_eval(given.url, given.name[0], given.model, given.work)
    elif given.part == "clients":
        for name in given.name:
            ask_as_clients(given.url, name, given.key)
    else:
        put_under_load(
            given.url,
            given.name,
            given.process,
            given.key,
            given.clients,
            given.seconds,
            given.work,
        )


if __name__ == "__main__":
    main()
