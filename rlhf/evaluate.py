"""Evaluation on held-out sets: the reward of new responses in online modes, the loss in offline modes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

from rlhf.config import Config
from rlhf.contracts import Algorithm, Sample, Sums, rewarded
from rlhf.data import sets
from rlhf.data.records import Records
from rlhf.metrics import Metrics, first
from rlhf.output import say
from rlhf.rewards import rule
from rlhf.roles import Roles
from rlhf.rollout.grader import Grader
from rlhf.rollout.measures import MATH, Outcome, attempts, by_category, categories, measured, outcomes
from rlhf.rollout.source import EngineSource

MOST_SHOWN = 40  # characters of the name of a category in a table


class Evaluation(Protocol):
    """Evaluates and adds metrics whose names begin with eval_. Every rank calls it."""

    def __call__(self, metrics: Metrics) -> None: ...


@dataclass(slots=True)
class Measured:
    """The result of a held-out set."""

    whole: Sums
    categories: dict[str, Sums]  # empty: no record has a category
    passes: list[int]  # the k of pass@k; empty: it is not defined


@dataclass(slots=True)
class ResponseEvaluation:
    """Measures the rewards of evaluate.samples new responses to each of the first evaluate.prompts prompts of each set.

    Mode evaluate consists of this evaluation alone. rule: the reward function for held-out prompts.
    model: adds the score of the reward model. It is not called if evaluate.function is set.
    """

    config: Config
    source: EngineSource
    held_out: Mapping[str, Records]  # by the name of the set
    rule: Grader
    model: Callable[[list[Sample]], None]

    def __call__(self, metrics: Metrics) -> None:
        self.measure(metrics)

    def measure(self, metrics: Metrics) -> dict[str, Measured]:
        """Add the metrics of each set, and return them by the name of the set. They are the same on every rank."""
        keys = self.config.evaluate
        prompts = {name: records.head(keys.prompts) for name, records in self.held_out.items()}
        answered = {name: self.source.answer(asked, self.rule) for name, asked in prompts.items()}
        if not keys.function:
            self.model([sample for samples in answered.values() for sample in rewarded(samples)])
        found: dict[str, Measured] = {}
        for name, samples in answered.items():
            metrics.keep("evaluate", samples)
            show(first(metrics.mesh, samples, keys.show), name if len(answered) > 1 else "")
            found[name] = self._measured(self._outcomes(metrics, samples), categories(prompts[name]))
            metrics.add_common(_named(metrics.prefixes[name], found[name].whole, found[name].categories))
        return found

    def _outcomes(self, metrics: Metrics, samples: list[Sample]) -> list[Outcome]:
        """Return the outcomes of all prompts in order. samples: the share of this replica."""
        votes = self.config.evaluate.samples > 1 and MATH in (self.config.evaluate.function or rule(self.config))
        mine = outcomes(samples, votes) if metrics.mesh.is_first_in_replica else []
        return sorted((outcome for part in metrics.mesh.all_gather(mine) for outcome in part), key=lambda o: o.group)

    def _measured(self, found: list[Outcome], kinds: Mapping[int, str]) -> Measured:
        passes = attempts(found, self.config.evaluate.samples)
        return Measured(measured(found, passes), by_category(found, kinds, passes), passes)


@dataclass(slots=True)
class LossEvaluation:
    """Measures the loss of the trained model on each set, and the metrics that the loss function returns."""

    config: Config
    roles: Roles
    algorithm: Algorithm
    held_out: Mapping[str, Records]  # by the name of the set

    def __call__(self, metrics: Metrics) -> None:
        """Raises UserError on all ranks if two sets have a metric of the same name."""
        found = {name: self._of_set(metrics, name) for name in self.held_out}
        metrics.mesh.agree(_shared(found))
        for sums in chain(*found.values()):
            metrics.add(sums)

    def _of_set(self, metrics: Metrics, name: str) -> list[Sums]:
        """Return this rank's parts of the metrics of a set: one, or one per category."""
        samples = self.held_out[name].head(self.config.evaluate.prompts)
        kinds = categories(samples)
        samples = self.roles.share(samples)
        self.roles.score(samples, self.algorithm.streams)
        samples, _ = self.algorithm.credit(samples, metrics.mesh.total)
        if not kinds:
            return [_named(metrics.prefixes[name], self._losses(samples), {})]
        parts = [(kind, [s for s in samples if kinds[s.group] == kind]) for kind in dict.fromkeys(kinds.values())]
        found = [(kind, self._losses(part)) for kind, part in parts]
        return [_named(metrics.prefixes[name], sums, {kind: sums}) for kind, sums in found]

    def _losses(self, samples: list[Sample]) -> Sums:
        role = self.roles.subject
        return self.roles.evaluate(role, samples, partial(self.algorithm.loss, role), self.algorithm.whole_groups)


def prefixes(config: Config) -> dict[str, str]:
    """Return how the names of a held-out set's metrics begin, by the name of the set.

    A single set without NAME= has no name in them.
    """
    paths = sets.named(config.data.eval, "data.eval")
    if len(paths) == 1 and tuple(paths.values()) == config.data.eval:
        return dict.fromkeys(paths, "eval_")
    return {name: f"eval_{name}_" for name in paths}


def _named(prefix: str, whole: Sums, kinds: Mapping[str, Sums]) -> Sums:
    """Return the metrics of a set and of its categories under their names in metrics.jsonl."""
    sums = {f"{prefix}{name}": pair for name, pair in whole.items()}
    return sums | {
        f"{prefix}{name}/category/{kind}": pair for kind, part in kinds.items() for name, pair in part.items()
    }


def _shared(found: Mapping[str, list[Sums]]) -> str:
    """Return an error message if two held-out sets have a metric of the same name, else "".

    With dpo.sft, the sets x and x_sft both have eval_x_sft_loss. The names are known only when a loss is computed.
    """
    owners: dict[str, str] = {}
    for name, parts in found.items():
        for metric in chain(*parts):
            if (other := owners.setdefault(metric, name)) != name:
                both = f"data.eval: the sets {other} and {name} both have the metric {metric}"
                return f"{both}; give one of them another name: NAME=PATH"
    return ""


def table(config: Config, found: Mapping[str, Measured]) -> str:
    """Return the text that mode evaluate prints: the metrics of each set, and the file with the responses."""
    lines = []
    for entry, result in zip(config.data.eval, found.values(), strict=True):
        lines += [f"{config.policy.load} on {entry}:", *_block(result, config.evaluate.samples)]
    return "\n".join([*lines, f"every response: {config.out}/samples/{config.mode}.jsonl"])


def _block(result: Measured, samples: int) -> list[str]:
    """Return the lines of a set: one per metric, then one per category with its main metrics."""
    rows = {name: total / count for name, (total, count) in result.whole.items() if count}
    width = max(map(len, rows), default=0)
    lines = [f"  {name:{width}}  {value:10.4g}" for name, value in rows.items()]
    if samples > 1 and not result.passes:
        remedy = "set evaluate.function to such a function, without a weight in reward.weights"
        lines.append(f"  no pass@k: it needs rewards that are all 0 or 1; {remedy}")
    return lines + _by_category(result.categories)


def _by_category(kinds: Mapping[str, Sums]) -> list[str]:
    """Return the lines of a table with one row per category."""
    if not kinds:
        return []
    rows = {
        kind: {name: f"{total / count:.4g}" for name, (total, count) in part.items() if count}
        for kind, part in kinds.items()
    }
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [["category", *names]] + [
        [_cut(kind), *(row.get(name, "") for name in names)] for kind, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"  {line[0]:{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
        for line in cells
    ]


def _cut(kind: str) -> str:
    return kind if len(kind) <= MOST_SHOWN else f"{kind[: MOST_SHOWN - 3]}..."


def show(samples: list[Sample], name: str = "") -> None:
    """Print prompts, responses and rewards. name: of the set, if there are several."""
    for sample in samples:
        turns = sample.text.turns or [{"role": "assistant", "content": sample.text.response}]
        said = "".join(f" {'=>' if turn['role'] == 'assistant' else '<='} {turn['content']}" for turn in turns)
        text = sample.text.prompt + said + (" [cut]" if sample.truncated else "")
        reward = "failed" if sample.verdict.failed else f"{sample.reward:g}"
        say(textwrap.indent(f"{name and f'{name}: '}reward {reward} | {text}", "    "))
