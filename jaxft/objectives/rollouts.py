"""A feed whose batches the policy itself makes: prompts, completions sampled for them, and what these are worth."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.feed import Fed, Given, Sampled
from jaxft.data.packing import smallest_bucket
from jaxft.errors import UserError
from jaxft.objectives.completions import collate_completions
from jaxft.objectives.graders import Outside
from jaxft.objectives.judging import (
    Verdicts,
    joined,
    journal_of,
    judged,
    require_judged,
    same_rewards,
    spreads_of,
    sums_of,
    total_of,
)
from jaxft.objectives.prompted import PromptBatches, judges_of
from jaxft.objectives.rewarding import REWARDING, Judgement, kl_of_rewards
from jaxft.objectives.watching import Watch, correlation
from jaxft.runtime import processes

TRAIN, GREEDY, EVAL = 0, 1, 2  # kinds of draws
ARRAYS = [name for name in Sampled._fields if name != "busy"]  # a row a completion


class Answers(NamedTuple):
    """What a policy answered to a batch of prompts, and what graders said of it.

    Attributes:
        indices: of the prompts.
        sampled: `group` completions of each.
        verdicts: on these.
        greedy: on the likeliest answer to each prompt; None where it is not asked for.
    """

    indices: list[int]
    sampled: Sampled
    verdicts: Verdicts
    greedy: Verdicts | None


@dataclasses.dataclass
class Experience:
    """A batch of rollouts, ready to be learned from.

    Attributes:
        arrays: of the whole batch, over all hosts.
        sums: as of `Fed`.
        indices: of its prompts.
        tokens: how many its rows hold.
        journal, lines: as of `Fed`; told once.
    """

    arrays: dict[str, np.ndarray]
    sums: dict[str, tuple[float, float]]
    indices: list[int]
    tokens: int
    journal: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[str] = ()


class Rollouts:
    """Prompts, answered by the policy as it stands and judged: see `jaxft.data.feed.Feed`.

    Each batch of rollouts is learned from `config.rollout.updates` times. With `config.rollout.ahead` the next one is
    sampled and judged while the run learns from this one, by the policy before that update.

    Args:
        batches: which prompts are asked when.
        given: what samples, and lays rows out on the devices.
    """

    def __init__(self, batches: PromptBatches, given: Given) -> None:
        assert given.policy is not None
        self.batches, self._place, self._policy = batches, given.place, given.policy
        self._config = given.policy.config
        self._judges = judges_of(self._config)
        self._outside = Outside(given.policy.ask, given.policy.embed)
        # Batches that were taken, and passes left over the present one.
        self._number, self._left = 0, 0
        self._present: Experience | None = None
        self._next: concurrent.futures.Future[Answers] | None = None
        self._watch = Watch(self._config.rollout.max_new_tokens)
        self._sampler = concurrent.futures.ThreadPoolExecutor(1)
        self._graders = concurrent.futures.ThreadPoolExecutor(1)

    @property
    def steps_per_epoch(self) -> int:
        """Updates in which every prompt is asked once."""
        return self.batches.steps_per_epoch

    def next(self, state: Any) -> Fed:
        """The present batch once more, or a new one of the policy's."""
        if self._left == 0:
            self._present = self._taken(state)
            self._left = int(self._config.rollout.updates)
        present = self._present
        assert present is not None
        self._left -= 1
        fed = Fed(
            self._placed(present.arrays),
            lambda: present.tokens,
            lambda: [self.batches.prompts.origin(index) for index in present.indices],
            present.sums,
            present.journal,
            present.lines,
        )
        present.journal, present.lines = (), ()
        return fed

    def _placed(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        own = slice(*self.batches.host_rows)
        return self._place({name: array[own] for name, array in arrays.items()})

    def _taken(self, state: Any) -> Experience:
        if not self._config.rollout.ahead:
            answers = self._answers(state, self._number)
        else:
            asked = self._next or self._begun(state, self._number)
            answers = asked.result()
            self._next = self._begun(self._policy.kept(state), self._number + 1)
        self._number += 1
        return self._experience(state, answers)

    def _begun(self, state: Any, number: int) -> concurrent.futures.Future[Answers]:
        """A batch that is sampled and judged meanwhile; of several processes, which work in step, at once."""
        if not processes.several():
            return self._sampler.submit(self._answers, state, number)
        done: concurrent.futures.Future[Answers] = concurrent.futures.Future()
        done.set_result(self._answers(state, number))
        return done

    def _answers(self, state: Any, number: int) -> Answers:
        """What the policy answers to the prompts of a batch, each part of which is judged as the next is sampled."""
        indices, rollout = self.batches.indices(number), self._config.rollout
        size = -(-len(indices) // min(rollout.parts, len(indices)))
        parts: list[tuple[Sampled, concurrent.futures.Future[Verdicts]]] = []
        for first in range(0, len(indices), size):
            some = indices[first : first + size]
            one = self._sampled(
                state, some, rollout.group, rollout.temperature, (TRAIN, number), first
            )
            parts.append((one, self._judging(some, one)))
        greedy = None
        if REWARDING[self._config.objective.name].greedy:
            alone = self._sampled(state, indices, 1, 0.0, (GREEDY, number))
            greedy = self._judging(indices, alone).result()
        arrays = {name: np.concatenate([getattr(one, name) for one, _ in parts]) for name in ARRAYS}
        sampled = Sampled(**arrays, busy=float(np.mean([one.busy for one, _ in parts])))
        return Answers(indices, sampled, joined([asked.result() for _, asked in parts]), greedy)

    def _sampled(
        self,
        state: Any,
        indices: Sequence[int],
        group: int,
        temperature: float,
        stream: tuple[int, int],
        first: int = 0,
    ) -> Sampled:
        prompts = [self.batches.prompts[index].tokens.tolist() for index in indices]
        return self._policy.sample(
            state,
            prompts,
            group=group,
            temperature=temperature,
            stream=stream,
            first=first,
            learned=stream[0] == TRAIN,
        )

    def _judging(
        self, indices: Sequence[int], sampled: Sampled
    ) -> concurrent.futures.Future[Verdicts]:
        rows = [self.batches.prompts.rows[index] for index in indices]
        arguments = (self._judges, rows, sampled, self._policy, self._outside)
        if not processes.several():
            return self._graders.submit(judged, *arguments)
        done: concurrent.futures.Future[Verdicts] = concurrent.futures.Future()
        done.set_result(judged(*arguments))
        return done

    def _experience(self, state: Any, answers: Answers) -> Experience:
        """The rows to learn from, with what was better than expected and by how much."""
        sampled, verdicts = answers.sampled, answers.verdicts
        require_judged(verdicts, self._judges)
        arrays, tokens = self._rows(answers)
        if self._policy.reference is not None:
            arrays["reference"] = self._policy.reference(state, self._placed(arrays))
        settings = self._config.objective
        row, known = REWARDING[settings.name], self._judgement(arrays, answers)
        advantages = np.asarray(row.baseline(settings, known), np.float32)
        new = arrays["sampled"].shape[1:]
        own = new if advantages.ndim == 2 else new[:1]
        arrays["advantages"] = advantages.reshape(-1, *own)
        if row.in_reward:
            arrays.pop("reference", None)
        if self._config.rollout.updates > 1 or self._config.rollout.ahead:
            arrays["off_policy"] = np.ones((len(answers.indices), 1), np.float32)
        group = int(self._config.rollout.group)
        rows = [self.batches.prompts.rows[index] for index in answers.indices]
        journal = journal_of(self._judges, rows, sampled, verdicts, advantages, self._policy)
        lines = self._watched(sampled, verdicts, group)
        sums = sums_of(self._judges, sampled, verdicts)
        sums |= spreads_of(self._judges, sampled, verdicts, group)
        if row.in_reward:
            sums["kl"] = kl_of_rewards(settings, known)
        return Experience(arrays, sums, answers.indices, tokens, journal, lines)

    def _rows(self, answers: Answers) -> tuple[dict[str, np.ndarray], int]:
        """The batch but for its advantages, and how many tokens it holds."""
        sampled, rollout = answers.sampled, self._config.rollout
        prompts = [self.batches.prompts[index].tokens.tolist() for index in answers.indices]
        each = sampled.lengths.reshape(len(prompts), -1)
        needed = np.asarray([len(prompt) - 1 for prompt in prompts]) + (each + 1).sum(axis=1)
        arrays = collate_completions(
            prompts,
            sampled.tokens,
            sampled.lengths,
            length=smallest_bucket(int(needed.max()), self.batches.buckets),
            pad_id=self.batches.pad_id,
        )
        left_out = self._config.objective.mask_truncated & sampled.truncated.astype(bool)
        counted = np.where(left_out, 0, sampled.lengths).astype(np.int32)
        shape = (len(prompts), each.shape[1])
        arrays |= {
            "counted": counted.reshape(shape),
            "sampled": sampled.log_probabilities.reshape(*shape, -1),
            "temperature": np.full((len(prompts), 1), rollout.temperature or 1.0, np.float32),
        }
        return arrays, sum(map(len, prompts)) + int(sampled.lengths.sum())

    def _judgement(self, arrays: Mapping[str, np.ndarray], answers: Answers) -> Judgement:
        sampled = arrays["sampled"]
        flat = (-1, sampled.shape[2])
        mask = np.arange(sampled.shape[2]) < arrays["counted"].reshape(-1, 1)
        return Judgement(
            rewards=answers.verdicts.rewards,
            weights=tuple(grader.weight for grader in self._judges.graders),
            group=int(self._config.rollout.group),
            mask=mask,
            sampled=sampled.reshape(flat),
            reference=arrays["reference"].reshape(flat) if "reference" in arrays else None,
            greedy=None if answers.greedy is None else answers.greedy.rewards,
        )

    def _watched(self, sampled: Sampled, verdicts: Verdicts, group: int) -> list[str]:
        total = total_of(verdicts.rewards, self._judges.graders)
        watched = total_of(verdicts.watched, self._judges.watching)
        by_group = (total.reshape(-1, group), sampled.lengths.reshape(-1, group))
        return self._watch.lines(
            reward=_mean(total),
            length=_mean(sampled.lengths),
            watched=_mean(watched) if self._judges.watching else np.nan,
            by_length=correlation(*by_group),
            truncated=_mean(sampled.truncated),
            same=_mean(same_rewards(total, group)),
        )

    def once(self, state: Any) -> Iterator[Fed]:
        """All prompts, each answered once; nothing is learned from them, and there are no arrays."""
        count = len(self.batches.prompts)
        size, warmth = (
            min(self.batches.batch_size, count),
            float(self._config.rollout.eval_temperature),
        )
        for first in range(0, count, size):
            some = list(range(first, min(first + size, count)))
            # Always of one shape, which is compiled once.
            filled = [*some, *range(size - len(some))]
            sampled = self._sampled(state, filled, 1, warmth, (EVAL, 0), first)
            own = {name: getattr(sampled, name)[: len(some)] for name in ARRAYS}
            sampled = Sampled(**own, busy=sampled.busy)
            verdicts = self._judging(some, sampled).result()
            said = int(sampled.lengths.sum())
            sums = sums_of(self._judges, sampled, verdicts)
            yield Fed({}, functools.partial(int, said), list, sums)

    def state(self) -> dict[str, Any]:
        """How far it is; with batches that were sampled and are not yet learned from, which none would give again."""
        present = self._present if self._left else None
        return {
            "step": self._number,
            **self.batches.settings,
            "data": self.batches.prompts.digest,
            "left": self._left,
            "present": None if present is None else _written(present),
            "next": None if self._next is None else _answered(self._next.result()),
            "watch": self._watch.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`.

        Raises:
            UserError: it is of other prompts, another seed or another batch size.
        """
        if not {"step", "data", "left", "present", "next", "watch"} <= state.keys():
            raise UserError("the checkpoint's data state is of another version of jaxft")
        for name, value in self.batches.settings.items():
            if state[name] != value:
                raise UserError(
                    f"the order of the prompts changed: {name} was {state[name]} when the checkpoint was written and "
                    f"is {value} now"
                )
        if state["data"] != self.batches.prompts.digest:
            raise UserError(
                "the prompts, or what stands beside them, changed since the checkpoint was written: put the old file "
                "back or begin in a new folder"
            )
        self._number, self._left = int(state["step"]), int(state["left"])
        self._present = None if state["present"] is None else _experienced(state["present"])
        self._next = None
        if state["next"] is not None:
            self._next = concurrent.futures.Future()
            self._next.set_result(_answers_of(state["next"]))
        self._watch.restore(state["watch"])


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _packed(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays as a text, for JSON."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(file.getvalue()).decode()


def _unpacked(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _written(present: Experience) -> dict[str, Any]:
    return {
        "arrays": _packed(present.arrays),
        "sums": {name: list(pair) for name, pair in present.sums.items()},
        "indices": present.indices,
        "tokens": present.tokens,
    }


def _experienced(state: Mapping[str, Any]) -> Experience:
    sums = {name: (float(total), float(weight)) for name, (total, weight) in state["sums"].items()}
    return Experience(_unpacked(state["arrays"]), sums, list(state["indices"]), state["tokens"])


def _answered(answers: Answers) -> dict[str, Any]:
    """Answers as JSON."""
    sampled, verdicts, greedy = answers.sampled, answers.verdicts, answers.greedy
    arrays = {**sampled._asdict(), "rewards": verdicts.rewards, "watched": verdicts.watched}
    arrays["busy"] = np.asarray(sampled.busy)
    if greedy is not None:
        arrays["greedy"] = greedy.rewards
    return {"indices": answers.indices, "arrays": _packed(arrays), "reasons": verdicts.reasons}


def _answers_of(state: Mapping[str, Any]) -> Answers:
    arrays = _unpacked(state["arrays"])
    if not set(Sampled._fields) <= arrays.keys():
        raise UserError("the checkpoint's data state is of another version of jaxft")
    busy = float(arrays["busy"])
    verdicts = Verdicts(arrays["rewards"], arrays["watched"], list(state["reasons"]))
    greedy = arrays.get("greedy")
    alone = None if greedy is None else Verdicts(greedy, greedy[:, :0], [])
    sampled = Sampled(**{name: arrays[name] for name in ARRAYS}, busy=busy)
    return Answers(list(state["indices"]), sampled, verdicts, alone)
