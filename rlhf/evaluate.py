"""Evaluation on held-out records: the reward of new responses in online modes, the loss in offline modes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from rlhf.config import Config
from rlhf.contracts import Algorithm, Sample, rewarded
from rlhf.data.records import Records
from rlhf.metrics import Metrics, first, say
from rlhf.roles import Roles
from rlhf.rollout.grader import Grader
from rlhf.rollout.measures import summary
from rlhf.rollout.source import EngineSource


class Evaluation(Protocol):
    """Evaluates and adds metrics whose names begin with eval_. Every rank calls it."""

    def __call__(self, metrics: Metrics) -> None: ...


@dataclass(slots=True)
class ResponseEvaluation:
    """Measures the reward of one new response to each of the first evaluate.prompts held-out prompts.

    Mode evaluate consists of this evaluation alone. rule: the reward function for held-out prompts.
    model: adds the score of the reward model. It is not called if evaluate.function is set.
    """

    config: Config
    source: EngineSource
    held_out: Records
    rule: Grader
    model: Callable[[list[Sample]], None]

    def __call__(self, metrics: Metrics) -> None:
        samples = self.source.answer(self.held_out.head(self.config.evaluate.prompts), self.rule)
        if not self.config.evaluate.function:
            self.model(rewarded(samples))
        metrics.keep("evaluate", samples)
        show(first(metrics.mesh, samples, self.config.evaluate.show))
        metrics.add_share({f"eval_{name}": pair for name, pair in summary(samples).items()})


@dataclass(slots=True)
class LossEvaluation:
    """Measures the loss of the trained model, and the metrics that the loss function returns."""

    config: Config
    roles: Roles
    algorithm: Algorithm
    held_out: Records

    def __call__(self, metrics: Metrics) -> None:
        role, algorithm = self.roles.subject, self.algorithm
        samples = self.roles.share(self.held_out.head(self.config.evaluate.prompts))
        self.roles.score(samples, algorithm.streams)
        samples, _ = algorithm.credit(samples, metrics.mesh.total)
        sums = self.roles.evaluate(role, samples, partial(algorithm.loss, role), algorithm.whole_groups)
        metrics.add({f"eval_{name}": pair for name, pair in sums.items()})


def table(config: Config, values: Mapping[str, float]) -> str:
    """Return the text that mode evaluate prints: the metrics, and the file with the responses."""
    rows = {name.removeprefix("eval_"): value for name, value in values.items() if name.startswith("eval_")}
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {value:10.4g}" for name, value in rows.items()]
    file = f"{config.out}/samples/{config.mode}.jsonl"
    return "\n".join([f"{config.policy.load} on {config.data.eval[0]}:", *lines, f"every response: {file}"])


def show(samples: list[Sample]) -> None:
    """Print prompts, responses and rewards."""
    for sample in samples:
        turns = sample.text.turns or [{"role": "assistant", "content": sample.text.response}]
        said = "".join(f" {'=>' if turn['role'] == 'assistant' else '<='} {turn['content']}" for turn in turns)
        text = sample.text.prompt + said + (" [cut]" if sample.truncated else "")
        reward = "failed" if sample.verdict.failed else f"{sample.reward:g}"
        say(textwrap.indent(f"reward {reward} | {text}", "    "))
