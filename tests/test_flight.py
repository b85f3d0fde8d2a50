"""Which groups in flight a step takes: the oldest complete ones, none later than allowed, and all in the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf import configuration, shapes
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import ABSENT, Completion
from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.rollout.flight import Group, Response, choose


def groups(count: int, begun: int, first: int = 0) -> list[Group]:
    return [Group(ABSENT, (first + i, 0), begun, [Response(), Response()]) for i in range(count)]


def complete(group: Group) -> None:
    for response in group.responses:
        response.finish = "stop"


def test_the_oldest_complete_ones_are_taken() -> None:
    flight = groups(5, begun=3)
    for i in (4, 1, 3):
        assert choose(flight, 3, 3, 4) == []
        complete(flight[i])
    assert choose(flight, 3, 3, 4) == [flight[1], flight[3], flight[4]]
    complete(flight[0])
    assert choose(flight, 3, 3, 4) == [flight[0], flight[1], flight[3]]
    flight[2].responses[0].finish = "stop"
    assert not flight[2].complete, "its other response is not"


def test_a_step_waits_for_a_group_that_would_come_too_late() -> None:
    flight = [*groups(1, begun=2), *groups(3, begun=4, first=1)]
    for group in flight[1:]:
        complete(group)
    assert choose(flight, 2, 4, 3) == flight[1:3]
    assert choose(flight, 2, 4, 2) == [], "the first one is learned two steps after it was begun, at the latest"
    complete(flight[0])
    assert choose(flight, 2, 4, 2) == flight[:2]
    late = groups(4, begun=4)
    complete(late[3])
    assert choose(late, 1, 4, 3) == [late[3]], "the three others in the next three steps"
    assert choose(late, 1, 4, 2) == []


@pytest.mark.parametrize(
    ("quota", "inflight", "max_lag"), [(1, 2.0, 1), (4, 1.25, 1), (4, 2.0, 1), (3, 2.5, 2), (8, 5.0, 4), (5, 1.4, 4)]
)
def test_no_group_is_taken_too_late(quota: int, inflight: float, max_lag: int) -> None:
    """This holds for any order of completion. A step that waits never waits for a group that cannot complete."""
    rng, flight, taken, begun = np.random.default_rng(7), list[Group](), list[Group](), 0
    for step in range(60):
        fresh = groups(round(quota * inflight) + len(taken) - begun, step, begun)
        begun += len(fresh)
        flight += fresh
        left = [group for group in flight if not group.complete]
        rng.shuffle(left)
        while not (chosen := choose(flight, quota, step, max_lag)):
            complete(left.pop())
        assert len(chosen) == quota
        assert chosen == sorted(chosen, key=lambda group: group.key)
        assert all(step - group.begun <= max_lag for group in chosen)
        flight = [group for group in flight if group not in chosen]
        taken += chosen
    assert len(set(map(id, taken))) == 60 * quota
    assert max(step - group.begun for step, group in zip(np.repeat(range(60), quota), taken, strict=True)) > 0


def test_a_response_is_what_all_weights_drew_of_it() -> None:
    response = Response()
    response.extend(Completion([5, 6], [-0.1, -0.2], "held"), 3)
    assert response.finish == ""
    response.extend(Completion([], [], "held"), 4)
    response.extend(Completion([7], [-0.3], "length"), 5)
    assert (response.tokens, response.logp, response.version) == ([5, 6, 7], [-0.1, -0.2, -0.3], [3, 3, 5])
    assert response.finish == "length"
    restored = Response.restored(response.state())
    assert restored == response
    assert restored.state()["logp"].dtype == torch.float64, "bit by bit"


ARCH = Architecture(
    family="llama", layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=128, context=128, eps=1e-5,
    tied=False, rope_theta=1e4,
)  # fmt: skip


def test_more_in_flight_than_can_be_learned_in_time_is_refused() -> None:
    def check(*keys: str) -> None:
        shapes._check_sampling(
            configuration.load("grpo", ["data.max_tokens=64", "rollout.max_tokens=8", "rollout.engine=kvcache", *keys]),
            ARCH,
            1,
        )

    check("rollout.inflight=3", "rollout.max_lag=2")
    with pytest.raises(
        UserError,
        match=r"rollout.inflight=3.1 begins more groups than rollout.max_lag=2 steps can use: set it to 3 at most",
    ):
        check("rollout.inflight=3.1", "rollout.max_lag=2")
    with pytest.raises(UserError, match=r"rollout.inflight"):
        check("rollout.inflight=0.9")


@pytest.mark.parametrize(("mode", "section"), [("grpo", "grpo"), ("rlhf", "ppo")])
def test_tokens_of_older_weights_are_weighed(mode: str, section: str) -> None:
    """The default is on if tokens may be of older weights.

    OnlineDPO has no such weight, and a run prints that.
    """
    for keys, cap in (
        ([], 0.0),
        (["rollout.inflight=1.5"], 2.0),
        (["rollout.inflight=1.5", f"{section}.mismatch_cap=0"], 0.0),
    ):
        config = configuration.load(mode, keys)
        assert ALGORITHMS[mode](config).weight_limits == (("token_truncate", 0.0, cap) if cap else None)
    assert ALGORITHMS[mode].weighs
    assert not ALGORITHMS["online-dpo"].weighs
