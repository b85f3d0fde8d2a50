"""The memory ledger: numbers by hand, shapes of real tensors, and its decisions for every shipped configuration."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf import configuration, dryrun, shapes
from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.ledger import CONTEXT, GIB, Ledger, parameters
from rlhf.model import architecture
from rlhf.phases import Kind, Phase, Tenant, Visit

ROOT = Path(__file__).parents[1]
MODES = ("sft", "reward", "rlhf", "dpo", "online-dpo", "grpo")
ROLLOUT, LEARN = Visit(Phase.ROLLOUT), Visit(Phase.LEARN, "policy")
WEIGHTS, GRADIENTS, OPTIMIZER = (Tenant("policy", kind) for kind in (Kind.WEIGHTS, Kind.GRADIENTS, Kind.OPTIMIZER))
SIZES = {
    "7B": (8, 6_738_415_616),
    "13B": (16, 13_015_864_320),
    "70B": (32, 68_976_648_192),
}  # GPUs of the tutorial, parameters


def ledger(mode: str, size: str, *overrides: str, device: float = 80.0) -> Ledger:
    """Return the ledger of a shipped mode and size. Its reward model, if any, has the size of the policy."""
    folder = f"{ROOT}/configs/models/llama2-{size}"
    needed = [f"reward.load={folder}"] if mode in ("rlhf", "online-dpo") else []
    files = [f"{ROOT}/configs/{mode}.toml", f"{ROOT}/configs/llama2-{size}.toml"]
    config = configuration.load(mode, [*files, f"policy.load={folder}", *needed, *overrides])
    return made(config, SIZES[size][0], device)


def made(config: Config, world: int, device: float) -> Ledger:
    arch, roles = shapes.shapes(config, world)
    return Ledger(config, arch, roles, world, device, 2)


def test_7b_by_hand() -> None:
    """6.74e9 parameters over tp 4: 2 bytes of weights, 4 of gradients, 12 of optimizer over dp 2.

    Every rank has all norms.
    """
    count = (SIZES["7B"][1] - 65 * 4096) // 4 + 65 * 4096
    tenants = ledger("sft", "7B").tenants[0]
    assert tenants[WEIGHTS] * GIB == 2 * count == pytest.approx(3.37e9, rel=1e-3)
    assert tenants[GRADIENTS] * GIB == 4 * count
    assert tenants[OPTIMIZER] * GIB == 12 * count / 2
    assert ledger("sft", "7B", "parallel.zero=false").tenants[0][OPTIMIZER] * GIB == 12 * count
    rollout = ledger("grpo", "7B").rows(ROLLOUT, 0)
    assert rollout["engine weights"] * GIB == 2 * SIZES["7B"][1]
    assert CONTEXT + sum(rollout[name] for name in ("engine weights", "engine cache", "engine work")) == pytest.approx(
        0.7 * 80
    )
    # Keys and values of one token: 2 x 32 layers x 4096 x 2 bytes = 512 KiB.
    assert ledger("grpo", "7B").sequences() == pytest.approx(rollout["engine cache"] * 2**30 / (1024 * 512 * 2**10))


def test_tensor_parallel_ranks_exchange_hidden_states() -> None:
    """Each slot holds the hidden states of a micro-batch: 4096 wide, 2 bytes each."""
    from rlhf.parallel.exchange import SLOTS

    shape = ("parallel.tp=2", "parallel.dp=4", "batch.tokens=8192")
    assert ledger("sft", "7B", *shape).rows(LEARN, 0)["exchange"] * GIB == SLOTS * 8192 * 4096 * 2
    for other in ((*shape, "parallel.sp=false"), ("parallel.tp=8", "parallel.dp=1")):
        assert "exchange" not in ledger("sft", "7B", *other).rows(LEARN, 0)


def test_activations_by_hand() -> None:
    """7B on one rank keeps, per token and layer, 4 x 4096 of norms, 6 x 4096 of attention and 3 x 11008 of the MLP.

    Each has 2 bytes.
    """
    shape = ("parallel.tp=1", "parallel.dp=8", "batch.tokens=8192")
    works = [
        ledger("sft", "7B", *shape, f"parallel.recompute={r}").rows(LEARN, 0)["work"]
        for r in ("none", "selective", "full")
    ]
    token = 2 * (10 * 4096 + 3 * 11008)
    assert (works[0] - works[1]) * GIB == pytest.approx(
        32 * 8192 * 2 * 2 * 4096
    )  # rotated queries and keys are computed again
    assert (works[0] - works[2]) * GIB == pytest.approx(8192 * (32 * token - 32 * 2 * 4096 - token))


def test_tokens_of_the_largest_micro_batch() -> None:
    """The size is batch.tokens, or the longest text, or two of them if a pair shares a micro-batch.

    Context-parallel ranks split it.
    """
    for mode, texts in (("sft", 1), ("grpo", 1), ("reward", 2), ("dpo", 2), ("online-dpo", 2)):
        for longest in (512, 4096):
            keys = ("parallel.tp=1", "parallel.dp=8", "rollout.max_tokens=256")
            made = ledger(mode, "7B", *keys, "batch.tokens=2048", f"data.max_tokens={longest}")
            whole = ledger(mode, "7B", *keys, f"batch.tokens={max(2048, texts * longest)}", "data.max_tokens=512")
            for visit in made.visits[-2:]:
                assert made.rows(visit, 0)["work"] == whole.rows(visit, 0)["work"] > 0
    shape = ("parallel.tp=1", "parallel.recompute=full", "batch.tokens=8192")
    split = [ledger("reward", "7B", *shape, f"parallel.cp={cp}", f"parallel.dp={8 // cp}") for cp in (1, 2)]
    whole, half = (
        made.rows(Visit(Phase.LEARN, "reward"), 0)["work"] for made in split
    )  # of a model without logits, which are computed in chunks
    assert whole == pytest.approx(2 * half)


def test_sequence_parallel_ranks_split_norms_and_residuals() -> None:
    """7B at tp 2 keeps, per token and layer, 4 x 4096 of norms. Sequence parallelism keeps half of them."""
    shape = ("parallel.tp=2", "parallel.dp=4", "batch.tokens=8192")
    whole, split = (ledger("sft", "7B", *shape, f"parallel.sp={sp}").rows(LEARN, 0)["work"] for sp in ("false", "true"))
    assert (whole - split) * GIB == pytest.approx(32 * 8192 * 2 * 4 * 4096 / 2)


def test_activations_of_pipeline_stages() -> None:
    """With 1F1B the first of two stages has two micro-batches in flight, and the last has one.

    The saved tensors of a layer count once for each.
    """
    shape = ("parallel.tp=1", "parallel.pp=2", "parallel.dp=4", "batch.tokens=8192")
    made = [ledger("sft", "7B", *shape, f"parallel.recompute={recompute}") for recompute in ("none", "selective")]
    saved = [[each.rows(LEARN, stage)["work"] * GIB for stage in range(2)] for each in made]
    rotated = 16 * 8192 * 2 * 2 * 4096  # queries and keys of half of the layers
    assert [full - less for full, less in zip(*saved, strict=True)] == pytest.approx([2 * rotated, rotated])


@pytest.mark.parametrize(("tp", "heads"), [(4, 2), (8, 1), (16, 1)])
def test_cache_of_grouped_queries(tp: int, heads: int) -> None:
    """70B has 64 query heads, and keeps keys and values of 8 heads of 128.

    If there are more ranks than kv heads, each rank has a whole one.
    """
    made = ledger("grpo", "70B", f"rollout.tp={tp}", "rollout.cache=10", "data.max_tokens=4096")
    assert made.rows(ROLLOUT, 0)["engine cache"] == 10.0
    assert made.sequences() == pytest.approx(10 * GIB / (4096 * 2 * 80 * heads * 128 * 2))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    """Ranks share all parameters except norms. The first and the last stage have a table of the vocabulary each."""
    arch = architecture.read(ROOT / f"configs/models/llama2-{size}")
    assert arch.num_parameters() == SIZES[size][1]
    norms = (2 * arch.layers + 1) * arch.hidden
    stages = [parameters(arch, "megatron", 4, 2, stage) for stage in range(2)]
    assert 4 * sum(stages) == arch.num_parameters() + 3 * norms
    assert parameters(arch, "vllm", 4) == sum(stages)


def test_a_remedy_is_a_split_that_the_model_has() -> None:
    """7B has 32 heads, and the run has 8 ranks."""
    made = ledger("grpo", "7B")
    fits = [
        tp
        for tp in (1, 2, 3, 8, 16, 64)
        if made._fits(replace(made.config, rollout=replace(made.config.rollout, tp=tp)))
    ]
    assert fits == [1, 2, 8]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_shipped_configurations_fit(mode: str, size: str) -> None:
    """Every mode fits at every size on the tutorial's machine.

    A tenant is offloaded only if it does not fit otherwise.
    """
    shipped = ledger(mode, size)
    shipped.check()
    for tenant in shipped.offload:
        kept = shipped.offload - {tenant}
        assert any(shipped.need(visit, kept) > shipped.room for visit in shipped.visits), f"{tenant} could have stayed"
    assert (ROOT / f"configs/{mode}.toml").read_text().startswith("#")


def test_70b_ppo_offloads_its_optimizers() -> None:
    assert {OPTIMIZER, Tenant("critic", Kind.OPTIMIZER)} <= ledger("rlhf", "70B").offload


def test_what_is_offloaded() -> None:
    """Nothing is offloaded if there is room, everything on demand, and otherwise the cheapest first."""
    assert not ledger("rlhf", "7B", device=1000.0).offload
    assert not ledger("rlhf", "7B", "memory.offload=none").offload
    everything = ledger("rlhf", "7B", "memory.offload=all")
    assert everything.offload == everything.tenants[0].keys()
    assert len(everything.offload) == 8  # two trained roles with three tenants, two frozen ones with one
    assert ledger("grpo", "7B").offload == {GRADIENTS}


@pytest.mark.parametrize(
    ("mode", "size", "overrides", "said"),
    [
        ("rlhf", "7B", ["memory.offload=none"], "phase rollout needs 102.3 .* set memory.offload=auto"),
        ("grpo", "7B", ["rollout.memory=0.98"], "phase rollout needs .* set rollout.memory=0.9"),
        ("grpo", "70B", ["rollout.memory=0.15"], "leaves 0 GiB of cache.* set rollout.memory=0.25"),
        ("sft", "7B", ["batch.tokens=131072"], "phase learn/policy needs .* set parallel.recompute=full"),
        (
            "sft",
            "13B",
            ["parallel.tp=2", "parallel.dp=8", "parallel.zero=false", "parallel.recompute=full"],
            "phase learn/policy needs .* set parallel.zero=true",
        ),
        ("sft", "70B", ["parallel.pp=1", "parallel.tp=2", "parallel.dp=16"], "split it over more ranks"),
    ],
)
def test_refusals_name_the_phase_and_the_knob(mode: str, size: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ledger(mode, size, *overrides).check()


def test_a_device_in_use_is_refused() -> None:
    """The memory that the process itself uses at the start, its context, is not counted twice."""
    sft = ledger("sft", "7B")
    most = sft.need(LEARN)
    sft.check(free=most - CONTEXT + 0.1)
    with pytest.raises(
        UserError,
        match=r"phase learn/policy needs 31.9 GiB, but only 30.0 GiB of the device are free: end the programs",
    ):
        sft.check(free=30.0)


def test_on_a_cpu_nothing_has_to_fit() -> None:
    anywhere = ledger("rlhf", "70B", device=math.inf)
    anywhere.check()
    assert not anywhere.offload


def test_mean_over_stages() -> None:
    """The metrics memory/ are means over all ranks, so the report compares them with the mean over the stages."""
    made = ledger("sft", "70B")
    stages = [sum(made.rows(LEARN, stage).values()) for stage in range(4)]
    assert len(made.tenants) == 4
    assert sum(made.mean(LEARN).values()) == pytest.approx(sum(stages) / 4)
    assert max(stages) > 1.05 * sum(stages) / 4


def test_measured_stands_beside_predicted() -> None:
    table = ledger("sft", "7B").table(peaks={LEARN: 28.04})
    assert table.splitlines()[-2].split() == ["measured", "-", "28.0"]


def dry_run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlhf", *arguments, "--dry-run"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_dry_run_of_a_fresh_clone(tmp_path: Path) -> None:
    """It needs no GPU, weights or data. The configuration that it prints can be loaded, and is the same."""
    done = dry_run("rlhf", "configs/rlhf.toml", "configs/llama2-70B.toml", "optim.clip=0.7")
    assert done.returncode == 0, done.stderr
    assert "32 ranks: tp 8 x pp 4 x cp 1 x dp 1; 4 engines of 8" in done.stdout
    assert "1024 prompts x 1 response = 1024 samples" in done.stdout
    assert "8 mini-batches = 8 a step, 1600 in 200 steps" in done.stdout
    assert "policy.optimizer *" in done.stdout
    (tmp_path / "printed.toml").write_text(done.stdout.partition("\nreward.load is not set")[0])
    asked = configuration.load(
        "rlhf", [f"{ROOT}/configs/rlhf.toml", f"{ROOT}/configs/llama2-70B.toml", "optim.clip=0.7"]
    )
    assert configuration.load("rlhf", [str(tmp_path / "printed.toml")]) == asked
    assert replace(asked, optim=replace(asked.optim, clip=0.5)) != asked


def test_dry_run_counts_the_steps_of_epochs(tmp_path: Path) -> None:
    """It counts the lines of data.train. Without this file, it shows everything else."""
    data = tmp_path / "a.jsonl"
    keys = ["epochs=2.5", "batch.prompts=8", "batch.epochs=3", f"data.train={data}"]
    config = configuration.load("sft", keys)
    unknown = f"3 a step, the number of steps of epochs=2.5 is unknown (data set {data}: no such file or folder"
    assert unknown in dryrun.batch(config, 1)
    data.write_text('{"prompt": "Q?", "response": "A."}\n' * 33)
    assert "= 3 a step, 33 in 11 steps, which are 2.5 epochs of 33 lines" in dryrun.batch(config, 1)
    assert "is unknown (data.train is not set)" in dryrun.batch(configuration.load("sft", ["epochs=1"]), 1)


def test_dry_run_refuses_what_cannot_fit() -> None:
    done = dry_run("rlhf", "configs/rlhf.toml", "configs/llama2-7B.toml", "memory.device=30")
    assert done.returncode == 2
    assert "predicted" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "of 30 GiB may be used" in done.stderr
