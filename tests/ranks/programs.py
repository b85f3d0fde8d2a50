"""Run under torchrun: whole programs with signals, a wrong engine, or files of another program.

usage: torchrun --nproc-per-node N tests/ranks/programs.py FOLDER LAYOUT

FOLDER is the one of modes.py.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import groups
import pytest
from endpoint import Endpoint
from modes import KEYS, STEPS, assembled, configure, drawing, metrics, train

from rlhf import assemble, configuration
from rlhf.config import Config
from rlhf.data import sets
from rlhf.errors import RewardError
from rlhf.interrupt import SAVED
from rlhf.parallel.mesh import Mesh, lost
from rlhf.rewards import Rewards, rule
from rlhf.rollout.kvcache import KVCache


def start(config: Config) -> int:
    """Return the exit code of a whole program with a mesh of its own."""
    groups.close()
    return assemble.run(config)


def check_engine_without_the_weights(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that wrong weights of the engine are reported: before the first step, and with rollout.check later too."""
    step, wake = 0, KVCache.wake

    def drawn(now: int) -> None:
        nonlocal step
        step = now

    def spoilt(engine: KVCache) -> None:
        wake(engine)
        if step >= begin:
            engine.parameters()["lm_head.weight"].mul_(0.9)

    with pytest.MonkeyPatch.context() as patch, drawing(drawn):
        patch.setattr(KVCache, "wake", spoilt)
        for begin, keys in ((0, []), (2, ["rollout.check=true"])):
            with pytest.raises(RuntimeError, match="the engine does not generate with the trained weights"):
                start(configure(folder, "grpo", layout, f"out={folder}/spoilt{begin}", "checkpoint.every=0", *keys))
            assert step == begin


def check_signal(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that the run finishes and saves the current step at a signal, and that the next run continues.

    The exit code tells it, and config.toml is the configuration of the run.
    """
    rules = [f"reward.function={folder}/rules.py:length", f"evaluate.function={folder}/rules.py:quarter"]
    config = configure(folder, "grpo", layout, f"out={folder}/program", "steps=2", *rules)
    with drawing(lambda step: os.kill(os.getpid(), signal.SIGUSR1)):
        assert start(config) == SAVED
    assert (folder / "program/latest").read_text() == "step_000001"
    assert start(config) == 0
    rows = metrics(folder / "program")
    assert list(rows) == [0, 1, 2]
    assert rows[2]["eval_reward"] == 0.25, "the held-out function's"
    assert rows[2]["reward_rule"] != 0.25
    assert configuration.load("grpo", [f"{folder}/program/config.toml"]) == config


def check_evaluation(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that mode evaluate, on the exported folder, gives the run's last numbers.

    There are two sets with two samples per prompt, and one has categories. Rewards are those of function and reward
    model, or of evaluate.function alone. `out` may be the folder of the run: mode evaluate writes its own files there,
    with every response, and changes no other, except that the report shows them.
    """
    assert start(configure(folder, "online-dpo", layout, f"out={folder}/pairs", "steps=1")) == 0
    wanted = {name: value for name, value in metrics(folder / "pairs")[1].items() if name.startswith("eval_")}
    if mesh.rank == 0:
        (folder / "pairs/hf/model.safetensors.index.json").write_text("{}")  # not read, which a remark says
    mesh.barrier()
    keys = [f"policy.load={folder}/pairs/hf", *(key.format(folder=folder) for key in KEYS["online-dpo"])]
    files = [path for path in (folder / "pairs").rglob("*") if path.is_file() and path.name != "report.html"]
    before = {path: path.read_bytes() for path in files}
    mesh.barrier()
    sets = f"data.eval={[*configure(folder, 'online-dpo', layout).data.eval]}"
    found, lines = {}, {}
    for name, out, more in (
        ("both", "pairs", ["log.samples=0"]),
        ("both", "pairs", ["log.samples=2"]),  # overwrites the files of the first one
        ("judge", "judged", [f"evaluate.function={folder}/rules.py:even"]),
        ("one", "one", ["evaluate.samples=1", f"data.eval={folder}/data/kinds_prompts.jsonl"]),
        ("hot", "hot", ["evaluate.temperature=2"]),
    ):
        run = configure(folder, "evaluate", layout, *keys, f"out={folder}/{out}", sets, *more)
        assert start(run) == 0
        (found[name],) = metrics(folder / out, "evaluate").values()
        lines[name] = [json.loads(line) for line in (folder / out / "samples/evaluate.jsonl").read_text().splitlines()]
        assert len(lines[name]) == (8 if name == "one" else 32)
    assert {path: path.read_bytes() for path in before} == before
    if mesh.rank == 0:  # this process was the run, and keeps its lock until it ends
        program = f"import pathlib; from rlhf import lock; print(lock.hold(pathlib.Path('{folder}/pairs/run.lock')))"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert other.stdout.startswith(f"process {os.getpid()} on "), other
    assert found["both"] == pytest.approx({**wanted, "step": 0}, abs=1e-5)
    first = [line["response_tokens"] for line in lines["both"] if line["set"] == "kinds"][::2]
    assert [line["response_tokens"] for line in lines["one"]] == first, "whatever else is sampled"
    assert found["one"]["eval_prompts/category/odd"] == 4
    assert found["judge"]["eval_dev_pass@1"] == found["judge"]["eval_dev_reward"]
    pairs = [sum(line["reward"] for line in lines["judge"][at : at + 2]) for at in range(0, 16, 2)]
    assert found["judge"]["eval_dev_pass@2"] == sum(map(bool, pairs)) / 8
    assert 0 < sum(pairs) < 16, "the case needs right and wrong responses"
    hot, both = (found[name]["eval_dev_reward"] for name in ("hot", "both"))
    assert hot != pytest.approx(both, abs=1e-3)


def check_judge(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that a judge gives the rewards of training and evaluation, and that no file of the run has its key.

    Every fourth answer has no rating, so these rewards fail.
    """
    asked, key = count(), "sk-known-0815"
    (folder / "rubric.txt").write_text("Rate {{ response }} to {{ prompt }}")
    with (
        Endpoint(lambda body: "[[2.5]]" if next(asked) % 4 else "?", key=key) as endpoint,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("OPENAI_API_KEY", key)
        keys = ["reward.function=judge", "evaluate.function=judge", f"judge.rubric={folder}/rubric.txt"]
        keys += [f"judge.url={endpoint.url}", "reward.load=", f"out={folder}/rated", "steps=1"]
        config = configure(folder, "grpo", layout, *keys)
        assert start(config) == 0
    rows = metrics(folder / "rated")
    assert rows[1]["reward"] == rows[1]["eval_reward"] == 2.5, rows
    assert 0 < rows[1]["reward_failed"] <= 0.5
    lines = (folder / "data/train_prompts.jsonl").read_text().splitlines()
    prompts, sent = [json.loads(line)["prompt"] for line in lines], str(endpoint.asked)
    assert any(prompt in sent for prompt in prompts)
    read = json.loads((folder / "rated/step_000001/meta.json").read_text())["run"]["read"]
    assert read["judge.rubric"][0] == config.judge.rubric
    for path in (path for path in (folder / "rated").rglob("*") if path.is_file()):
        assert key.encode() not in path.read_bytes(), path


def check_random_weights(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that policy.init=random needs no weights.

    They depend on the seed, and equal those that make_weights() wrote into another folder.
    """
    rows = []
    for name, init, seed in (("sft", "load", 1), ("model", "random", 1), ("model", "random", 2)):
        keys = [f"policy.load={folder}/{name}", f"policy.init={init}", f"seed={seed}", "steps=1"]
        assert start(configure(folder, "sft", layout, f"out={folder}/{init}{seed}", *keys)) == 0
        rows.append(metrics(folder / f"{init}{seed}"))
    loaded, same, other = rows
    assert same == loaded
    assert other[0]["eval_dev_loss"] != loaded[0]["eval_dev_loss"]


def check_in_flight(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check PPO and OnlineDPO with responses in flight: a resumed run equals an uninterrupted one bitwise.

    The prompts are those of two data sets.
    """
    for mode in ("rlhf", "online-dpo"):
        keys = [key.format(folder=folder) for key in KEYS[mode]] + two_sets(folder, "prompts")
        keys += ["rollout.inflight=1.5", "checkpoint.every=2", "log.samples=-1", "rollout.stop=['e']"]
        config = configure(folder, mode, layout, f"out={folder}/flying-{mode}", *keys)
        assert start(config) == 0
        whole, samples = metrics(folder / f"flying-{mode}"), Path(config.out) / f"samples/step_{STEPS:06}.jsonl"
        assert any(row.get("lag/1") for row in whole.values()), "some tokens were drawn by older weights"
        before = samples.read_text()
        held_out = sets.named(config.data.eval, "data.eval")
        assert {json.loads(line)["set"] for line in before.splitlines()} == {"train_prompts", "few", *held_out}
        assert {"set/few/reward", "set/train_prompts/reward"} <= whole[STEPS].keys()
        shutil.rmtree(folder / f"flying-{mode}/step_{STEPS:06}")
        (folder / f"flying-{mode}/latest").write_text("step_000002")
        assert start(config) == 0
        assert metrics(folder / f"flying-{mode}") == whole
        assert samples.read_text() == before


def check_signal_to_one_rank(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that all ranks stop after the same step, and continue from there.

    The numbers are those of an uninterrupted run.
    """
    faulthandler.dump_traceback_later(90, exit=True)  # ranks that do not agree would wait for each other
    keys = ["data.eval=", *two_sets(folder, "sft")]
    whole, cut = (configure(folder, "sft", layout, f"out={folder}/{name}", *keys) for name in ("whole", "cut"))
    train(whole, mesh)

    def last_rank_alone(step: int) -> None:
        if mesh.rank == mesh.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with drawing(last_rank_alone), Rewards(rule(cut), cut.reward) as rewards:
        assert not assembled(cut, mesh, rewards, rewards).train()
    assert sorted(path.name for path in (folder / "cut").glob("step_*")) == ["step_000001"]
    assert list(metrics(folder / "cut")) == [1], "nothing is held out"
    train(cut, mesh, first=1)
    assert metrics(folder / "cut") == metrics(folder / "whole")
    for row in metrics(folder / "cut").values():
        assert row["set/train_sft/share"] + row["set/few/share"] == 1.0
        assert abs(row["set/few/share"] - 1 / 3) < 2 / cut.batch.prompts
    faulthandler.cancel_dump_traceback_later()


def two_sets(folder: Path, kind: str) -> list[str]:
    """Return keys of two data sets. One of them is read half as often as the other."""
    data = folder / "data"
    return [f'data.train=["{data}/train_{kind}.jsonl", "few={data}/dev_{kind}.jsonl"]', "data.weights.few=0.5"]


def check_failed_rewards(folder: Path, layout: str, mesh: Mesh) -> None:
    """Check that all ranks end if too many rewards of one rank have failed. The error is that of this rank.

    Held-out responses have a judge. Before the run, one rank of the node asks whether it answers.
    """
    (folder / f"rubric{mesh.rank}.txt").write_text("Rate {{ response }}")
    mesh.barrier()
    keys = [f"reward.function={folder}/rules.py:fail_on_rank_1", "reward.max_failed=0.3", f"out={folder}/failed"]
    said = "12 of 24 rewards of step 1 failed, and reward.max_failed=0.3; .*: ValueError: this is rank 1$"
    with Endpoint() as endpoint:  # that of rank 0 is asked, because its configuration is that of the run
        keys += ["evaluate.function=judge", f"judge.rubric={folder}/rubric0.txt", f"judge.url={endpoint.url}"]
        with pytest.raises(RewardError, match=said):
            start(configure(folder, "grpo", layout, *keys))
    probes = [body for body in endpoint.asked if "the word yes" in body["messages"][0]["content"]]
    assert len(probes) == (mesh.rank == 0)
    assert (len(endpoint.asked) > 1) == (mesh.rank == 0)


def check_lost_rank(mesh: Mesh) -> None:
    """Check that ranks can distinguish the end of another rank from an error of their own.

    This check is the last one.
    """
    mesh.barrier()
    if mesh.rank == mesh.world - 1:
        os._exit(0)
    with pytest.raises(RuntimeError) as error:
        mesh.barrier()
    assert lost(error.value).startswith(("Connection closed by peer", "Read error", "Write error")), error.value
    assert not lost(RuntimeError("shapes do not match"))


def main() -> None:
    folder, layout = Path(sys.argv[1]), sys.argv[2]
    mesh = Mesh(configure(folder, "sft", layout).parallel, 1)
    if mesh.world > 1:
        check_signal_to_one_rank(folder, layout, mesh)
        check_failed_rewards(folder, layout, mesh)
        check_lost_rank(mesh)
    else:
        for check in (
            check_engine_without_the_weights,
            check_signal,
            check_evaluation,
            check_judge,
            check_random_weights,
            check_in_flight,
        ):
            check(folder, layout, mesh)
    if mesh.rank == 0:
        print("programs end well", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
