"""Run under torchrun with any number of ranks: the sampler with real engines (kvcache, random weights).

usage: torchrun --nproc-per-node N tests/ranks/sampling.py FOLDER

FOLDER holds model/ and train_rl.jsonl.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import nodes
from graders import FREE, Grading

from rlhf import configuration
from rlhf.config import Parallel
from rlhf.contracts import Sample, groups
from rlhf.data.packing import deal
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.model import architecture
from rlhf.parallel.mesh import Mesh
from rlhf.residence import Residence
from rlhf.rewards import Environments
from rlhf.rollout.kvcache import KVCache
from rlhf.rollout.measures import summary
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.source import EngineSource
from rlhf.weights import initial, names

POOLS = list[Environments]()  # they end with this process


def build(folder: Path, mesh: Mesh, *overrides: str) -> EngineSource:
    config = configuration.load(
        "grpo", ["data.max_tokens=96", "rollout.max_tokens=16", "rollout.group=3", "batch.prompts=4", *overrides]
    )
    arch, tokenizer = architecture.read(folder / "model"), Tokenizer.load(folder / "model")
    engine = KVCache(arch, tp=1, tp_rank=0, group=None, dtype=torch.float32, device="cpu", max_len=96)
    initial.fill(arch, names.tiles(arch, "vllm"), engine.parameters(), seed=5)

    def reward(samples: list[Sample]) -> None:
        for sample in samples:
            sample.reward = float(len(sample.text.response))

    records = Records.load(folder / "train_rl.jsonl", "prompts", tokenizer, config.data, max_prompt=80)
    grader = FREE if config.rollout.environment else Grading(reward)
    POOLS.append(Environments(config.rollout.environment, config.reward))
    owner = EngineOwner(engine, Residence((), mesh.device))
    return EngineSource(config, mesh, owner, tokenizer, records, grader, arch.hidden, environments=POOLS[-1])


def whole(mesh: Mesh, share: list[Sample]) -> list[Sample]:
    """Return the samples of all ranks, each of which has its share of the groups."""
    shared = mesh.all_gather(share)
    owners = [{s.group for s in part} for part in shared]
    assert sum(map(len, owners)) == len(set().union(*owners)), "a group is on two ranks"
    assert not any(s.text.record for part in shared for s in part)
    return sorted((s for part in shared for s in part), key=lambda s: s.group)


def take(source: EngineSource, step: int) -> list[Sample]:
    """Return all samples of a step."""
    return whole(source.mesh, source.take(step)[0])


def check_draw_is_a_function_of_seed_and_step(folder: Path, mesh: Mesh) -> None:
    """Check that samples depend on seed and step, and that each rank has only its share of them."""
    sampler = build(folder, mesh)
    first, again, later = (take(sampler, step) for step in (3, 3, 4))
    assert [s.tokens.tolist() for s in first] == [s.tokens.tolist() for s in again]
    assert [s.tokens.tolist() for s in first] != [s.tokens.tolist() for s in later]
    assert [s.group for s in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(s.tokens.tolist()) for s in first}) == 12, "siblings of a group came out alike"
    share, _ = sampler.take(3)
    assert len(share) == 12 // mesh.world
    groups_of = deal([len(s.mask) for s in first], [s.group for s in first], mesh.world, sampler.hidden)
    assert [s.tokens.tolist() for s in share] == [first[i].tokens.tolist() for i in groups_of[mesh.rank]]


def check_the_ranks_of_an_engine_share_its_samples(folder: Path, mesh: Mesh) -> None:
    """Check that the ranks of one engine grader equal shares of its samples.

    The samples are the same as with one engine per rank.
    """
    apart = build(folder, mesh)
    together = build(
        folder, mesh, f"rollout.tp={mesh.world}"
    )  # each rank has a whole engine, which counts as one rank of a shared engine
    rewarded = []
    reward = together.grader.call
    together.grader = Grading(lambda samples: rewarded.append(len(samples)) or reward(samples))

    def said(samples: list[Sample]) -> list[tuple]:
        return [(s.group, s.tokens.tolist(), s.reward, s.text, s.verdict, s.version.tolist()) for s in samples]

    drawn, same = take(together, 2), take(apart, 2)
    assert said(drawn) == said(same)
    assert all(np.allclose(a.sampler_logp, b.sampler_logp, atol=1e-5) for a, b in zip(drawn, same, strict=True))
    assert rewarded == [12 // mesh.world], rewarded
    prompts = apart.records.head(3)
    assert [s.tokens.tolist() for s in together.probe(prompts)] == [s.tokens.tolist() for s in apart.probe(prompts)]


def check_samples_are_aligned(folder: Path, mesh: Mesh) -> None:
    """Check that the mask covers only the response, and log-probs are at their labels.

    A response without a stop token is truncated.
    """
    sampler = build(folder, mesh)
    for s in take(sampler, 0):
        prompt = len(s.tokens) - int(s.mask.sum())
        assert s.mask.tolist() == [t >= prompt - 1 for t in range(len(s.tokens) - 1)]
        assert (s.sampler_logp[s.mask] < 0).all()
        assert (s.sampler_logp[~s.mask] == 0).all()
        assert (s.version[s.mask] == 0).all()
        assert (s.version[~s.mask] == -1).all()
        assert s.truncated == (s.tokens[-1] not in sampler.tokenizer.stop_ids)
        assert s.tokens[prompt:].tolist() == s.tokens[s.mask.argmax() + 1 :].tolist()
        assert s.text.response == sampler.tokenizer.decode(s.tokens[prompt:])
        assert s.reward == len(s.text.response)


def check_stop_string_cuts_tokens(folder: Path, mesh: Mesh) -> None:
    """Check that a stop string ends a response after that string. The tokens before it do not change."""
    free = take(build(folder, mesh), 0)
    letter = next(c for s in free for c in s.text.response[2:] if c.isalpha())
    stopped = take(build(folder, mesh, f"rollout.stop=[{letter!r}, 'never seen']"), 0)
    for a, b in zip(free, stopped, strict=True):
        assert b.tokens.tolist() == a.tokens[: len(b.tokens)].tolist()
        if letter in a.text.response:
            assert letter in b.text.response
            assert letter not in sampler_text_without_last(folder, b)
            assert not b.truncated
        else:
            assert len(a.tokens) == len(b.tokens)
    assert any(len(a.tokens) > len(b.tokens) for a, b in zip(free, stopped, strict=True))


def sampler_text_without_last(folder: Path, sample: Sample) -> str:
    return Tokenizer.load(folder / "model").decode(sample.tokens[1:][sample.mask][:-1])


SEVERAL = ["evaluate.samples=3", "evaluate.temperature=1"]


def check_answers(folder: Path, mesh: Mesh) -> list[Sample]:
    """Check greedy answers and their metrics. Return several answers per prompt.

    The k-th answer to a prompt does not depend on the number of answers.
    """
    sampler = build(folder, mesh)
    prompts = sampler.records.head(5)
    samples, again = (whole(mesh, sampler.answer(prompts, sampler.grader)) for _ in range(2))
    assert [s.tokens.tolist() for s in samples] == [s.tokens.tolist() for s in again]
    sums = summary(samples)
    assert sums["reward"] == (sum(s.reward for s in samples), 5.0)
    assert sums["response_tokens"][0] == sum(int(s.mask.sum()) for s in samples)
    one, several = (whole(mesh, build(folder, mesh, *keys).answer(prompts, FREE)) for keys in (SEVERAL[1:], SEVERAL))
    found = [[s.tokens.tolist() for s in group] for group in groups(several)]
    assert [group[0] for group in found] == [s.tokens.tolist() for s in one]
    assert all(len(set(map(tuple, group))) == 3 for group in found), "the answers to a prompt came out alike"
    return several


def check_dynamic_sampling(folder: Path, mesh: Mesh) -> None:
    """Check that groups of equal rewards are replaced by others.

    A step has batch.prompts groups if there are enough rounds.
    """
    sampler = build(folder, mesh, "rollout.rounds=5", "rollout.group=2")

    def parity(samples: list[Sample]) -> None:
        for sample in samples:
            sample.reward = float(len(sample.text.response) % 3 == 0)

    sampler.grader = Grading(parity)
    share, sums = sampler.take(0)
    kept = groups(whole(mesh, share))
    assert len(kept) == 4
    assert all(len({s.reward for s in group}) == 2 and len(group) == 2 for group in kept)
    rounds, found = sums["rounds"][0], sums["groups_kept"]
    assert 1 < rounds <= 5, "the case needs more than one round"
    assert 4 <= found[0] <= found[1] == 4 * rounds
    sampler.grader = FREE
    share, sums = sampler.take(0)
    assert len(groups(whole(mesh, share))) == 4, "the last round's groups, where none has unequal rewards"
    assert sums["groups_kept"] == (0.0, 20.0)


IN_FLIGHT = ["rollout.inflight=2.5", "rollout.max_lag=2", "rollout.max_tokens=32", "rollout.stop=['ap', 't', 'i']"]


def content(s: Sample) -> tuple:
    arrays = (s.tokens, s.version, s.sampler_logp)
    return (s.group, *(array.tolist() for array in arrays), s.reward, s.truncated, s.verdict)


def steps_in_flight(
    sampler: EngineSource, count: int, first: int = 0, between: Callable[[], object] = lambda: None
) -> list[list[tuple]]:
    """Return the samples of `count` steps. Each step has other weights."""
    found = []
    weights = {name: tensor.clone() for name, tensor in sampler.owner.engine.parameters().items()}
    for step in range(first, first + count):
        for name, tensor in sampler.owner.engine.parameters().items():
            tensor.copy_(weights[name] * (1 + step / 10))
        sampler.owner.version = step
        found.append([content(s) for s in take(sampler, step)])
        between()
    for name, tensor in sampler.owner.engine.parameters().items():
        tensor.copy_(weights[name])
    return found


def check_in_flight(folder: Path, mesh: Mesh) -> None:
    """Check that no step waits for the longest responses.

    Responses in flight continue, and come in a later step, also after an evaluation, a probe or a restart.
    """
    sampler = build(folder, mesh, *IN_FLIGHT)
    steps = steps_in_flight(sampler, 6)
    groups_of = [sorted({group for group, *_ in step}) for step in steps]
    assert all(len(found) == 4 and len(step) == 12 for found, step in zip(groups_of, steps, strict=True))
    held = {group.prompt.group for group in sampler.flight}
    everywhere = set().union(*mesh.all_gather(held))
    taken = [group for found in groups_of for group in found]
    assert sorted([*taken, *everywhere]) == list(range(6 * 4 + 6)), "each prompt in its turn, none lost, none twice"
    lags = [
        step - version
        for step, samples in enumerate(steps)
        for _, _, versions, *_ in samples
        for version in versions
        if version >= 0
    ]
    assert set(lags) == {0, 1, 2}, "the case needs old tokens, and none may be too old"
    mixed = [len({v for v in versions if v >= 0}) for samples in steps for _, _, versions, *_ in samples]
    assert max(mixed) > 1, "and responses that several weights have drawn"
    assert any(found != list(range(4 * step, 4 * step + 4)) for step, found in enumerate(groups_of)), (
        "and short ones that overtake"
    )

    assert steps_in_flight(build(folder, mesh, *IN_FLIGHT), 6) == steps
    sampler = build(folder, mesh, *IN_FLIGHT, *SEVERAL)
    prompts = sampler.records.head(5)
    assert steps_in_flight(sampler, 6, between=lambda: (sampler.answer(prompts, FREE), sampler.probe(prompts))) == steps

    for done in (1, 3):  # as a killed run that continues
        sampler = build(folder, mesh, *IN_FLIGHT)
        steps_in_flight(sampler, done)
        file = io.BytesIO()
        torch.save(sampler.state(), file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert len(set(map(bytes, mesh.all_gather(file.getvalue())))) == 1
        sampler = build(folder, mesh, *IN_FLIGHT)
        sampler.resume(done, state)
        assert steps_in_flight(sampler, 6 - done, done) == steps[done:]
        assert sampler.notes == []
    other = build(folder, mesh, *IN_FLIGHT)
    other.resume(3, {**state, "engines": mesh.world + 1})
    samples = [sample for step in steps_in_flight(other, 3, 3) for sample in step]
    assert "start again" in other.notes[0]
    begun = {group for step in groups_of[:3] for group in step}
    assert begun.isdisjoint(group for group, *_ in samples)
    assert all(version == -1 or version >= 3 for _, _, versions, *_ in samples for version in versions)
    assert steps_in_flight(build(folder, mesh, *IN_FLIGHT, "rollout.inflight=1"), 1) == steps_in_flight(
        build(folder, mesh, *IN_FLIGHT[2:]), 1
    )


def check_log_probs_of_every_version(folder: Path, mesh: Mesh) -> None:
    """Check that each token has the log-prob of the weights that drew it."""
    sampler = build(folder, mesh, *IN_FLIGHT)
    steps = steps_in_flight(sampler, 5)
    engine = sampler.owner.engine
    weights = {name: tensor.clone() for name, tensor in engine.parameters().items()}
    for version in range(5):
        for name, tensor in engine.parameters().items():
            tensor.copy_(weights[name] * (1 + version / 10))
        for _, tokens, versions, logp, *_ in (sample for step in steps for sample in step):
            if version in versions:
                said = whole_logp(engine, tokens)
                gaps = [abs(a - b) for a, b, v in zip(said, logp, versions, strict=True) if v == version]
                assert max(gaps) < 1e-4


@torch.no_grad()
def whole_logp(engine: KVCache, tokens: list[int]) -> list[float]:
    """Return the log-probs of all tokens except the first, from one pass."""
    inputs = torch.tensor([tokens[:-1]])
    cache = torch.zeros(engine.arch.layers, 2, 1, inputs.shape[1], engine.kv_heads, engine.arch.head_dim)
    hidden = engine.forward(inputs, torch.arange(inputs.shape[1])[None], cache)
    return engine.logits(hidden[0]).log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def check_dynamic_sampling_in_flight(folder: Path, mesh: Mesh) -> None:
    """Check that rounds take complete groups, and that each round draws new prompts."""
    sampler = build(folder, mesh, *IN_FLIGHT, "rollout.rounds=4", "rollout.group=2")

    def parity(samples: list[Sample]) -> None:
        for sample in samples:
            sample.reward = float(len(sample.text.response) % 3 == 0)

    sampler.grader = Grading(parity)
    rounds = 0.0
    for step in range(4):
        share, sums = sampler.take(step)
        kept = groups(whole(mesh, share))
        assert all(len({s.reward for s in group}) == 2 and len(group) == 2 for group in kept)
        rounds += sums["rounds"][0]
    assert rounds > 4
    assert sampler.taken == 4 * rounds
    assert sampler.drawn == sampler.taken + 6


def main() -> None:
    import turns  # it imports this file

    folder, mesh = Path(sys.argv[1]), Mesh(Parallel(), seed=1)
    nodes.check_the_first_rank_goes_first(folder, mesh)
    check_draw_is_a_function_of_seed_and_step(folder, mesh)
    check_the_ranks_of_an_engine_share_its_samples(folder, mesh)
    check_samples_are_aligned(folder, mesh)
    check_stop_string_cuts_tokens(folder, mesh)
    answers = check_answers(folder, mesh)
    check_dynamic_sampling(folder, mesh)
    check_in_flight(folder, mesh)
    check_log_probs_of_every_version(folder, mesh)
    check_dynamic_sampling_in_flight(folder, mesh)
    drawn = [s.tokens.tolist() for s in [*take(build(folder, mesh), 0), *turns.check(folder, mesh), *answers]]
    if mesh.rank == 0:
        print("drawn", drawn, flush=True)
    mesh.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
