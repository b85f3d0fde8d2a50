"""Mode mtbench on the ranks: an engine answers the questions, turn by turn, and rank 0 writes the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rlhf import progress
from rlhf.benchmark import Talk, identity, models, reusable, talks
from rlhf.config import Config
from rlhf.contracts import Completion, Sampling
from rlhf.data.limits import Limits
from rlhf.data.tokenizer import Tokenizer
from rlhf.mtbench import answers
from rlhf.mtbench.answers import Answer
from rlhf.output import say
from rlhf.parallel.mesh import Mesh
from rlhf.prepare import Inputs
from rlhf.rollout.sampler import Sampler


def answer(config: Config, mesh: Mesh, given: Inputs, build: Callable[[], Sampler]) -> None:
    """Answer the questions, and write the answers. Every rank calls it. build: starts the engine.

    If `out` already has the answers, no engine starts. The next turn of a question begins when all engines have
    finished this one.
    """
    asked = mesh.first_on_node(lambda: talks(config, given))
    if mesh.all_gather(mesh.first_on_node(lambda: reusable(config, given, asked)))[0]:
        return
    sampler = build()
    if mesh.rank == 0:
        for remark in given.remarks:
            say(f"  {remark}")
        say(given.records.first())
    for turn in range(max(len(talk.question.turns) for talk in asked)):
        progress.begin(f"turn {turn + 1}")
        ask(config, sampler, [talk for talk in asked if turn < len(talk.question.turns)], turn)
    if mesh.rank == 0:
        _write(config, given, asked)


def ask(config: Config, sampler: Sampler, asked: list[Talk], turn: int) -> None:
    """Add the answer to the next turn of each dialogue. Every rank calls it. turn: the index of the turn."""
    tokenizer = sampler.tokenizer
    limits = Limits(tokenizer, config.data, config.data.max_tokens - config.rollout.max_tokens)
    prompts: list[tuple[Talk, list[int], Sampling]] = []
    usual = replace(sampler.sampling(), top_p=1.0, top_k=0)
    for talk in asked:
        tokens = talk.prompt(tokenizer)
        if config.data.overlong == "truncate":
            ((tokens, _, _),) = limits.cut([(tokens, [False] * len(tokens))], talk.text.template)
        if len(tokens) < config.data.max_tokens:
            prompts.append((talk, tokens, replace(usual, temperature=talk.question.temperature)))
        else:
            talk.hear("", cut=True)  # the dialogue so far leaves no room for an answer
    completions = sampler.complete([(tokens, sampling) for _, tokens, sampling in prompts], turn)
    for (talk, _, _), completion in zip(prompts, completions, strict=True):
        talk.hear(_text(config, tokenizer, completion), cut=completion.finish == "length")


def _text(config: Config, tokenizer: Tokenizer, completion: Completion) -> str:
    """Return an answer as FastChat writes it: without special tokens, stop strings and outer spaces."""
    text = tokenizer.decode(completion.tokens)
    for stop in config.rollout.stop:
        text = text.partition(stop)[0]
    return text.strip()


def _write(config: Config, given: Inputs, asked: list[Talk]) -> None:
    """Write the answers. Answers to other questions that the file has are kept."""
    (model,) = models(config)
    path = model.answers(config.out)
    made = answers.load(path) if path.exists() else {}
    for talk in asked:
        made[talk.question.id] = Answer(tuple(talk.turns), tuple(talk.cut), identity(config, given, talk))
    answers.write(path, model.name, made)
    cut, count = sum(len(talk.cut) for talk in asked), sum(len(talk.turns) for talk in asked)
    limits = f"rollout.max_tokens={config.rollout.max_tokens} or data.max_tokens={config.data.max_tokens}"
    say(f"{path}: {count} answers of {model.name} to {len(asked)} questions; {cut} were cut by {limits}")
