"""Responses with an environment, with real engines. This is part of sampling.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graders import FREE
from sampling import IN_FLIGHT, SEVERAL, build, steps_in_flight, take, whole, whole_logp

from rlhf.contracts import Sample
from rlhf.data import templates
from rlhf.parallel.mesh import Mesh

ENVIRONMENT = """
import time

class Echo:
    pause = 0.0

    def reset(self, record):
        self.most, self.texts = 1 + len(record["prompt"]) % 3, []
        return [{"role": "user", "content": "Say a thing: " + record["prompt"][:20]}] if self.most == 2 else None

    def step(self, text):
        time.sleep(self.pause * len(text))
        self.texts.append(text)
        over = len(self.texts) >= self.most
        return None if over else [{"role": "user", "content": f"{len(self.texts)} {text[-4:]} ?"}], len(text) / 8

class SlowEcho(Echo):
    pause = 0.01
"""
TURNS = [
    "rollout.max_tokens=48",
    "rollout.stop=['a', 't', 'i', 'o', 'e']",
    "rollout.environment={folder}/echo.py:Echo",
    "rollout.turns=3",
]


def keys(folder: Path) -> list[str]:
    return [key.format(folder=folder) for key in TURNS]


def everything(samples: list[Sample]) -> list[tuple]:
    return [(s.group, s.tokens.tolist(), s.version.tolist(), s.reward, s.text, s.verdict, s.truncated) for s in samples]


def check_an_environment_answers(folder: Path, mesh: Mesh) -> None:
    """Check that the environment's messages have the template's tokens and are not learned.

    The model's next turn follows them.
    """
    sampler = build(folder, mesh, *keys(folder))
    samples = [sample for step in range(3) for sample in take(sampler, step)]
    records = {s.text.row: s.text.record for s in sampler.records.head(0)}
    space: dict[str, Any] = {}
    exec(ENVIRONMENT, space)
    for s in samples:
        environment, said = space["Echo"](), list(s.text.turns)
        opening = environment.reset(records[s.text.row])
        first = int(s.mask.argmax()) + 1
        if opening:
            assert s.tokens[:first].tolist() == templates.encode(sampler.tokenizer, "plain", opening)[0]
            assert s.text.prompt == sampler.tokenizer.decode(s.tokens[1:first], skip_special=False)
        assert s.mask.tolist() == (s.version >= 0).tolist()
        assert (s.sampler_logp[~s.mask] == 0).all()
        logp = np.array(whole_logp(sampler.owner.engine, s.tokens.tolist()))
        assert np.allclose(logp[s.mask], s.sampler_logp[s.mask], atol=1e-4)
        earned, at = 0.0, first
        while said:
            assert said[0]["role"] == "assistant"
            end = next((t for t in range(at, len(s.tokens)) if not s.mask[t - 1]), len(s.tokens))
            turn = s.tokens[at:end].tolist()
            assert sampler.tokenizer.decode(turn) == said.pop(0)["content"]
            if said or not s.truncated:
                answer, reward = environment.step(sampler.tokenizer.decode(turn))
                earned += reward
            if said:
                assert [said.pop(0)] == answer
                behind = templates.reply(sampler.tokenizer, "plain", turn, answer)
                assert s.tokens[end : end + len(behind)].tolist() == behind
                at = end + len(behind)
            elif not s.truncated:
                assert answer is None
        assert s.mask[-1], "the last token is the model's"
        assert abs(s.reward - earned) < 1e-9 or s.truncated
        assert s.text.response == sampler.tokenizer.decode(s.tokens[first:])
    assert {1, 2, 3} == {sum(turn["role"] == "assistant" for turn in s.text.turns) for s in samples}
    prompts = sampler.records.head(3)
    assert all(s.mask.sum() + s.mask.argmax() == len(s.mask) for s in whole(mesh, sampler.probe(prompts))), (
        "nobody answers a probe"
    )


def check_turns_do_not_depend_on_time_or_ranks(folder: Path, mesh: Mesh) -> None:
    samples = everything(take(build(folder, mesh, *keys(folder)), 1))
    slow = keys(folder)[:2] + ["rollout.turns=3", f"rollout.environment={folder}/echo.py:SlowEcho"]
    assert everything(take(build(folder, mesh, *slow), 1)) == samples
    assert everything(take(build(folder, mesh, *keys(folder), f"rollout.tp={mesh.world}"), 1)) == samples
    few = take(build(folder, mesh, *keys(folder), "rollout.turns=1"), 1)
    assert {len(s.text.turns) for s in few} == {1}
    assert [s.truncated for s in few] == [s[-1] or len(s[4].turns) > 1 for s in samples]


def check_turns_in_flight(folder: Path, mesh: Mesh) -> None:
    """Check that turns continue after a restart. The environments get the earlier turns again."""
    given = [*IN_FLIGHT, *keys(folder)]
    steps = steps_in_flight(build(folder, mesh, *given), 4)
    assert any(-1 in s[2][s[2].index(next(v for v in s[2] if v >= 0)) :] for step in steps for s in step), (
        "the case needs answers"
    )
    sampler = build(folder, mesh, *given, *SEVERAL)
    prompts = sampler.records.head(5)
    assert steps_in_flight(sampler, 2, between=lambda: sampler.answer(prompts, FREE)) == steps[:2]
    file = io.BytesIO()
    torch.save(sampler.state(), file)
    sampler = build(folder, mesh, *given)
    sampler.resume(2, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert (
        any(response.turns and not response.finish for group in sampler.flight for response in group.responses)
        or mesh.world > 1
    )
    assert steps_in_flight(sampler, 2, 2) == steps[2:]


def check(folder: Path, mesh: Mesh) -> list[Sample]:
    """Run all checks. Return the samples of a step."""
    if mesh.rank == 0:
        (folder / "echo.py").write_text(ENVIRONMENT)
    mesh.barrier()
    check_an_environment_answers(folder, mesh)
    check_turns_do_not_depend_on_time_or_ranks(folder, mesh)
    check_turns_in_flight(folder, mesh)
    return take(build(folder, mesh, *keys(folder)), 0)
