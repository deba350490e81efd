"""Texts from prompts: `jaxft.generate`, and what `jaxft generate` runs."""

from __future__ import annotations

import collections
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32, UInt32
from tqdm import tqdm

from jaxft.data.chat import Ending, Tools, encode_chat_and_text, end_of_turn, template_for
from jaxft.data.messages import read_message
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.data.unwritten import Unwritten
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError, counted
from jaxft.inference.asked import Asked, Before, Prompt, read_prompts
from jaxft.inference.decoding import generate_tokens
from jaxft.inference.opening import as_chat, conversation, open_model, open_words, tell_how
from jaxft.models import Config, Transformer
from jaxft.models.transformer import fitted
from jaxft.weights import SLOTS, slots_of


def generate(
    model: Transformer,
    params: Mapping[str, Any],
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | str | Path,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
    origins: Sequence[str] = (),
    tools: Sequence[Tools] = (),
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """What the model says to each prompt, up to its first EOS, without special tokens.

    A prompt's draws depend on the seed, its tokens and how often it stood in the list before: not
    on the other prompts, their order or `batch_size`. The same prompt twice gives two draws.

    Args:
        model: the decoder; its `config` is all that is used.
        params: its tree, with or without adapters of any kind; or a bank, of `jaxft.stack_adapters`.
        prompts: texts, to which the tokenizer adds the BOS that it adds in training, or lists of
            messages, which go through its chat template, the assistant's turn begun.
        tokenizer: the model's, or the Hugging Face folder where it stands.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token each time; else the scores are divided by it.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1.0 for all.
        seed: of the draws.
        batch_size: prompts at once.
        progress: show a bar on a terminal's stderr, and say there what the chat template leaves out.
        origins: what an error calls each prompt; by default "prompt 1", ...
        tools: of each prompt, the functions that its template names; () for none.
        adapters: for each prompt, the name of its adapter in the bank; None for the base alone. A prompt's answer is
            the one that its adapter alone gives.

    Returns:
        A text for each prompt.

    Raises:
        UserError: a setting out of its range, a prompt without tokens, one that with
            `max_new_tokens` is longer than the model's `max_length`, or a token that the model
            does not have; a bank without `adapters`, or a name that it does not have.
    """
    if isinstance(prompts, str):
        raise UserError("generate takes a list of prompts: [prompt] for one")
    said = answers(
        model,
        params,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        origins=origins,
        tools=tools,
        adapters=adapters,
    )
    return [answer.text for answer in said]


class Answer(NamedTuple):
    """What a model said to a prompt.

    Attributes:
        text: without the token that ended it.
        tokens: of the answer, the one that ended it counted.
        prompt_tokens: of what was asked.
        ended: whether the model ended it, and not `max_new_tokens`.
    """

    text: str
    tokens: int
    prompt_tokens: int
    ended: bool


def answers(
    model: Transformer,
    params: Mapping[str, Any],
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | str | Path,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
    origins: Sequence[str] = (),
    tools: Sequence[Tools] = (),
    adapters: Sequence[str | None] | None = None,
) -> list[Answer]:
    """`generate` with what is counted of each answer."""
    check_settings(max_new_tokens, temperature, top_k, top_p, batch_size)
    model = Transformer(fitted(model.config, params))
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    origins = origins or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    unwritten = Unwritten()
    asked = list(zip(prompts, tools or [None] * len(prompts), origins, strict=True))
    encoded = [encode_prompt(tokenizer, *one, unwritten) for one in asked]
    if progress:
        _tell_what_is_left_out(asked, unwritten)
    check_lengths(model.config, encoded, origins, max_new_tokens)
    groups = groups_of(params, adapters, len(prompts))
    streams, found = streams_of(encoded, groups), dict[int, Answer]()
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    chats = [not isinstance(prompt, str) for prompt in prompts]
    turn = end_of_turn(tokenizer) if any(chats) else Ending()
    for batch in tqdm(
        _batches(encoded, batch_size, chats if turn.ids else ()), "generate", disable=hidden
    ):
        tokens, segments = padded([encoded[i] for i in batch])
        ending = turn if chats[batch[0]] else Ending()
        ids, lengths = generate_tokens(
            model.config,
            params,
            tokens,
            segments,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=(*tokenizer.eos_ids, *ending.ids),
            streams=streams[batch],
            groups=None if groups is None else groups[batch],
        )
        for i, row, length in zip(batch, ids, lengths, strict=True):
            ending = turn if chats[i] else Ending()
            said = row[:length].tolist()
            ended = said[-1] in (*tokenizer.eos_ids, *ending.ids)
            text = decoded(tokenizer, said, ending)
            found[i] = Answer(text, len(said), len(encoded[i]), ended)
    return [found[i] for i in range(len(encoded))]


def _tell_what_is_left_out(
    asked: Sequence[tuple[Prompt, Tools, str]], unwritten: Unwritten
) -> None:
    if any(isinstance(prompt, str) and own for prompt, own, _ in asked):
        print("jaxft: texts are asked without their tools: --chat asks them with", file=sys.stderr)
    for part in unwritten.left_out:
        # Reasoning is of earlier turns: templates leave it out with good reason.
        if "reasoning" not in part.what:
            print(f"jaxft: {part}", file=sys.stderr)


def check_settings(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, batch_size: int
) -> None:
    """Raises UserError for a setting out of its range."""
    least: dict[str, tuple[float, int]]
    least = {"max_new_tokens": (max_new_tokens, 1), "batch_size": (batch_size, 1)}
    least |= {"temperature": (temperature, 0), "top_k": (top_k, 0)}
    for name, (value, low) in least.items():
        if not low <= value < float("inf"):
            raise UserError(f"generate: {name} must be at least {low}, not {value}")
    if not 0 <= top_p <= 1:
        raise UserError(f"generate: top_p must be from 0 to 1, not {top_p}")


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, tools: Tools, origin: str, unwritten: Unwritten
) -> list[int]:
    """The ids of a text, or of a conversation with the assistant's turn begun; `unwritten` notes what is left out."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not prompt:
        return []  # a template would write the assistant's turn all the same
    messages = [
        read_message(f"{origin}: message {number}", dict(message))
        for number, message in enumerate(prompt, start=1)
    ]
    ids, text = encode_chat_and_text(tokenizer, messages, add_generation_prompt=True, tools=tools)
    template, rest = template_for(tokenizer, tools), len(messages)
    unwritten.note(origin, messages, text, template=template, tools=tools, first=rest)
    return ids


def check_lengths(
    config: Config, encoded: Sequence[list[int]], origins: Sequence[str], max_new_tokens: int
) -> None:
    """Raises UserError for a prompt without tokens, without room behind it, or of another vocabulary."""
    for ids, origin in zip(encoded, origins, strict=True):
        if not ids:
            raise UserError(f"{origin}: the prompt has no tokens: there is nothing to go on from")
        if len(ids) + max_new_tokens > config.max_length:
            raise UserError(
                f"{origin}: {counted(len(ids), 'token')} and max_new_tokens={max_new_tokens} are "
                f"{len(ids) + max_new_tokens} together; the model's longest is {config.max_length}"
            )
        if max(ids) >= config.vocabulary:
            raise UserError(
                f"{origin}: the tokenizer gives the id {max(ids)}, and the model's vocabulary has "
                f"{config.vocabulary}: is it another model's tokenizer?"
            )


def groups_of(
    params: Mapping[str, Any], adapters: Sequence[str | None] | None, count: int
) -> Int32[np.ndarray, " prompts"] | None:
    """The index in the bank of each prompt's adapter, -1 for none; None where `params` is no bank.

    Raises UserError where a bank's prompts have no names, or other than as many, or names that the bank does not have.
    """
    if adapters is None and SLOTS not in params:
        return None
    slots = slots_of(params)
    if adapters is None or isinstance(adapters, str):
        raise UserError(
            "generate: the tree is a bank: adapters=[...] says each prompt's, None is the base"
        )
    if len(adapters) != count:
        raise UserError(
            f"generate: {counted(len(adapters), 'adapter')} for {counted(count, 'prompt')}"
        )
    return np.asarray([-1 if name is None else slots.index(name) for name in adapters], np.int32)


def streams_of(
    encoded: Sequence[list[int]], groups: Int32[np.ndarray, " prompts"] | None = None
) -> UInt32[np.ndarray, " prompts"]:
    """A number for each prompt, of its tokens and of how often they stood in the list before, for the same adapter."""
    seen = collections.Counter[tuple[int, ...]]()
    streams = []
    for place, ids in enumerate(map(tuple, encoded)):
        own = ids if groups is None else (int(groups[place]), *ids)
        streams.append(zlib.crc32(np.asarray([seen[own], *ids], "<i4").tobytes()))
        seen[own] += 1
    return np.asarray(streams, np.uint32)


def _batches(
    encoded: Sequence[list[int]], batch_size: int, chats: Sequence[bool] = ()
) -> list[list[int]]:
    """Indices of prompts alike in length; the longest first, which show if the memory is enough.

    Where `chats` tells which prompts are conversations, these are by themselves: they end otherwise.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    kinds = [[i for i in order if chats[i] == kind] for kind in (False, True)] if chats else [order]
    return [
        kind[start : start + batch_size]
        for kind in kinds
        for start in range(0, len(kind), batch_size)
    ]


def padded(rows: Sequence[list[int]], least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments (batch, length), padded in front, of length `least` or more."""
    length = max(least, *map(len, rows))
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        segments[row, length - len(ids) :] = 1
    return tokens, segments


def decoded(tokenizer: Tokenizer, ids: list[int], turn: Ending) -> str:
    """The text of an answer, without the token that ended it, and up to the end of its turn."""
    # not every tokenizer marks the EOS that a generation_config names as special
    ended = bool(ids) and ids[-1] in (*tokenizer.eos_ids, *turn.ids)
    text = tokenizer.decode(ids[:-1] if ended else ids)
    return text.partition(turn.text)[0] if turn.text else text


def main(
    model: str,
    *,
    adapter: str = "",
    prompts: Sequence[str] = (),
    data: str = "",
    chat: bool | None = None,
    system: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    date: str = "",
    as_json: bool = False,
    dtype: str = "float32",
    before: Callable[[Tokenizer], Before] | None = None,
    **settings: Any,
) -> None:
    """`jaxft generate`: prints what a model folder, alone or with a PEFT adapter, says to prompts.

    A terminal gets each prompt with its answer below; a file, a pipe, or `as_json` gets JSON lines
    with "prompt" and "completion".

    Args:
        model: a Hugging Face folder, or "tiny": the base embedded in jaxft.
        adapter: a PEFT folder; "" for none. A chat template in it goes before the model's, and a base that was
            quantized in training is quantized so again.
        prompts: texts.
        data: a file, or whatever `read_rows` takes, instead: rows with "prompt" (a text or messages)
            or "messages", whose last is left out if the assistant says it, and with "system" and "tools".
        chat: whether a text is a user's message; None: where the model was trained on chats.
        system: a system message for the conversations that have none; they are chats then.
        tokenizer: a folder with another tokenizer.json; "": the model's.
        chat_template: a name, a file or the template itself; "": the adapter's or the tokenizer's.
        date: what the template takes for the present moment, as `config.data.date`; "": that moment.
        as_json: JSON lines on a terminal too.
        dtype: of the weights, the adapter and the computation: float32, bfloat16 or float16.
        before: for the model's tokenizer, what puts something before the prompts; their rows tell what.
        settings: the other arguments of `generate`.

    Raises:
        UserError: a folder or file that cannot be read, and whatever `generate` refuses.
    """
    asked: dict[str, Prompt] = {f"prompt {i}": text for i, text in enumerate(prompts, start=1)}
    asked, tools = read_prompts(data) if data else (asked, [])
    given = list(asked.values())
    words = open_words(model, adapter, tokenizer=tokenizer, chat_template=chat_template, date=date)
    texts = any(isinstance(prompt, str) for prompt in given)
    if (system or texts) and as_chat(words, chat, system):
        given = [conversation(prompt, system) for prompt in given]
    put_before = before(words.tokenizer) if before is not None else None
    network, params = open_model(model, adapter, dtype)
    if texts and chat is None and not system:
        tell_how(words)
    each = [Asked(prompt, None, lambda _: {}) for prompt in given]
    if put_before is not None:
        room = network.config.max_length - settings.get("max_new_tokens", MAX_NEW_TOKENS)
        room -= frame(words.tokenizer, given)
        each = put_before(dict(zip(asked, given, strict=True)), room)
    settings |= {"tokenizer": words.tokenizer, "progress": True}
    said = _answers(network, params, each, list(asked), tools, settings)
    plain = not as_json and sys.stdout.isatty()
    for prompt, one, answer in zip(asked.values(), each, said, strict=True):
        row = {"prompt": prompt, "completion": answer, **one.row(answer)}
        print(_shown(prompt, answer, row) if plain else json.dumps(row, ensure_ascii=False))


def _answers(
    network: Transformer,
    params: Mapping[str, Any],
    each: Sequence[Asked],
    origins: Sequence[str],
    tools: Sequence[Tools],
    settings: Mapping[str, Any],
) -> list[str]:
    """What is said to each, of the model or without it; says how many were refused."""
    open_ones = [index for index, one in enumerate(each) if one.answer is None]
    said = generate(
        network,
        params,
        [each[index].prompt for index in open_ones],
        origins=[origins[index] for index in open_ones],
        tools=[tools[index] for index in open_ones] if tools else (),
        **settings,
    )
    if len(open_ones) < len(each):
        refused = len(each) - len(open_ones)
        print(f"jaxft: {refused:,} of {counted(len(each), 'question')} refused", file=sys.stderr)
    model_says = dict(zip(open_ones, said, strict=True))
    return [one.answer or model_says[index] for index, one in enumerate(each)]


def frame(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Tokens that stand around the last message of the prompts, at most: their other messages and the template's."""
    most = 2  # BOS, and one to spare where texts meet
    for prompt in prompts:
        if not isinstance(prompt, str) and prompt:
            last = prompt[-1].get("content")
            own = len(tokenizer.encode(last, False)) if isinstance(last, str) else 0
            messages = [read_message("prompt", dict(message)) for message in prompt]
            whole, _ = encode_chat_and_text(tokenizer, messages, add_generation_prompt=True)
            most = max(most, len(whole) - own + 2)
    return most


def _shown(prompt: Prompt, answer: str, row: Mapping[str, Any]) -> str:
    turns = [] if isinstance(prompt, str) else prompt
    said = [f"{m['role']}: {m.get('content', '')}" for m in turns] or [str(prompt)]
    cited = [
        f"[{one['passage']}] {one['source']}, bytes {one['start']:,} to {one['end']:,}"
        for one in row.get("passages", ())
    ]
    return "\n".join([*(f"> {text}" for text in said), answer, *cited, ""])
