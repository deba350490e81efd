"""A jaxft model as lm-eval's: `jaxft.evaluation.LanguageModel`. Needs the extra `lm-eval`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxft.data.chat import render
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError
from jaxft.evaluation.continuations import Ids, answers_until, continuation_scores
from jaxft.models import Transformer

# What lm-eval's tasks call the most tokens of an answer, in the order in which it reads them.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWS = ("temperature", "top_k", "top_p")  # of what a task asks, what is taken
LONGEST_ANSWER = 256  # tokens where a task does not say: lm-eval's own default


class LanguageModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model, with or without adapters, over a dense or a quantized base, for lm-eval 0.4.13's `simple_evaluate`.

    What it gives equals lm-eval's own Hugging Face model over the same folder in float32, and does not depend on
    `batch_size` or on the mesh in force.

    Args:
        model: the decoder.
        params: its tree; on a mesh that is in force, as it lies there.
        tokenizer: the model's, or the folder where it stands.
        batch_size: sequences at once.
    """

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, Any],
        tokenizer: Tokenizer | str | Path,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.config, self.params, self.batch_size = model.config, params, batch_size
        self.tokenizer = (
            tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.tokenizer.name}: the tokenizer has no EOS token")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that follows nothing: BOS, or EOS without one."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.config.max_length

    @property
    def tokenizer_name(self) -> str:
        """Tells one tokenizer from another in lm-eval's cache."""
        return self.tokenizer.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around it unless that is False."""
        return self.tokenizer.encode(string, add_special_tokens is not False)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation. Without the prompt for an answer, its last message is left open."""
        messages = [dict(message) for message in chat_history]
        text, _ = render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], **options: Any
    ) -> list[tuple[float, bool]]:
        del options  # lm-eval's progress bar and batch size
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = continuation_scores(self.config, self.params, pairs, self.batch_size)
        for (asked, *_), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, whatever its length: in windows, each token predicted once."""
        del disable_tqdm
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain.from_iterable(windows))))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each text, up to what its task says that ends one."""
        del disable_tqdm
        found: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        for indices in alike.values():
            settings = self._settings(requests[indices[0]].args[1])
            contexts = [self.tok_encode(requests[index].args[0]) for index in indices]
            said = answers_until(
                self.config,
                self.params,
                self.tokenizer,
                contexts,
                batch_size=self.batch_size,
                **settings,
            )
            found |= dict(zip(indices, said, strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[index])
        return [found[index] for index in range(len(requests))]

    def _settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What a task asks of a generation, in our words."""
        until = asked.get("until") or []
        limit = next((asked[name] for name in LIMITS if asked.get(name)), LONGEST_ANSWER)
        if limit >= self.max_length:
            raise UserError(
                f"a task asks for answers of {limit} tokens (max_gen_toks), and the model reads "
                f"{self.max_length} in all"
            )
        draws = {name: asked[name] for name in DRAWS if asked.get(name) is not None}
        if asked.get("do_sample") is False:
            draws = {}
        elif asked.get("do_sample"):
            draws.setdefault("temperature", 1.0)
        return {
            "until": [until] if isinstance(until, str) else list(until),
            "max_new_tokens": int(limit),
            **draws,
        }
