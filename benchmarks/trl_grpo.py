"""Compare a GRPO step of this program with one of TRL's GRPOTrainer, one after the other on one GPU.

    pip install trl==1.16.0 datasets liger-kernel                  with this package and its vLLM
    python benchmarks/trl_grpo.py OUT                              16 layers of Llama-2-7B's shapes, 128 x 8 responses
    python benchmarks/trl_grpo.py OUT --again --weights bfloat16   TRL only; OUT has our run already
    python benchmarks/trl_grpo.py OUT --model toy --layers 1 --rows 4 batch.prompts=2 rollout.group=4 \\
        rollout.max_tokens=8                                       on a CPU
On a machine with several GPUs set CUDA_VISIBLE_DEVICES=0. OUT needs 8 GB.

Same work. Our run is that of step.py. TRL's arguments are read from its configuration: prompts and responses per step,
longest response, sampling, learning rate, AdamW, clipping, and no KL (so no reference model). Each engine uses the
memory that its trainer leaves; our trainer frees its gradients for it. Both have the same random weights, the same
prompts and random rewards. A step is one update, and no checkpoint is written. Random weights seldom end a response, so
most responses have the maximum length; the mean length of both is reported. Both weight tokens by the difference
between engine and learner (grpo.mismatch_cap; TRL's default vllm_importance_sampling_correction). TRL needs a separate
score pass for this. Ours uses the log-probs of the learn phase, because there is one update per step. To switch both
off: grpo.mismatch_cap=0 --trl vllm_importance_sampling_correction=false.

Measurement. For both it is the wall time of a whole step (TRL's from the end of the step before, with an idle device),
and the tokens of all prompts and responses without padding; a prompt counts once per response. tokens/s is the quotient
of their means over the steps after --warm. TRL's phases: rollout is the publish, sampling, sleep and decoding; score is
log-probs and advantages; learn is the rest. The metric mismatch between engine and learner shows that both engines
sample with the newest weights.

TRL's settings follow its guide to speed, except for what needs a download at run time: vLLM in the trainer's process
(colocate) with sleep mode, mixed precision, Liger's kernels if installed, no gradient checkpointing, and the largest
--rows that fits on an H200. TRL's GRPOTrainer has no padding-free batches. Attention is torch's: TRL and vLLM do not
install the FlashAttention package of the guide, and attention is below 2 % of the FLOPs at this length.
--trl KEY=VALUE sets other arguments of GRPOConfig, for example --trl gradient_checkpointing=true
--trl 'model_init_kwargs={"dtype":"float32","attn_implementation":"flash_attention_2"}'.
With --weights float32 (TRL's default), weights, gradients and AdamW's moments are float32, and matrix products are
bfloat16: the precision of this program. With bfloat16 all of them are bfloat16. This is faster, but rounding loses most
updates of this size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import record
import step
import torch

from rlhf import configuration
from rlhf.config import Config
from rlhf.data.tokenizer import Tokenizer
from rlhf.model.architecture import Architecture

demo_task = step.demo_task
KEYS = ["batch.prompts=128", "grpo.kl=0", "grpo.mismatch_cap=3", "rollout.memory=0.6"]
# Share of an H200 for TRL's engine. Weights, gradients and moments of 3.5 B parameters stay on the device.
LEFT = {"float32": 0.5, "bfloat16": 0.7}
GPU = torch.cuda.is_available()


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--model", choices=step.SIZES, default="7b")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--steps", type=int, default=1, help="number of counted steps, for both")
    p.add_argument("--warm", type=int, default=1, help="uncounted steps before")
    p.add_argument("--limit", type=int, default=300, help="time limit of our run in seconds")
    p.add_argument("--again", action="store_true", help="do not run ours again: its results are in OUT")
    p.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of TRL's weights, gradients and optimizer",
    )
    p.add_argument("--rows", type=int, default=32, help="responses per micro-batch of TRL")
    p.add_argument(
        "--trl",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of TRL's GRPOConfig, with a JSON value",
    )
    p.add_argument("keys", nargs="*", help="key=value for our run")
    return p.parse_intermixed_args()


def ours(a: argparse.Namespace, arch: Architecture) -> dict[str, float]:
    """Return the means over the counted steps of our run."""
    if not a.again:
        step.run(argparse.Namespace(**{**vars(a), "mode": "grpo", "keys": [*KEYS, *a.keys]}), arch)
    rows = step.counted(a)
    seconds = mean([row["time/step"] for row in rows])
    phases = {phase: mean([row[f"time/{phase}"] for row in rows]) for phase in ("rollout", "score", "learn", "publish")}
    tokens = mean([row["tokens_per_second"] * row["time/step"] for row in rows])
    return {
        "seconds": seconds,
        **phases,
        "tokens": tokens,
        **{name: mean([row[name] for row in rows]) for name in ("response_tokens", "mismatch")},
        "tokens_per_second": tokens / seconds,
    }


def arguments(a: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Return the arguments of TRL's GRPOConfig: from our configuration, then for speed, then from the command line."""
    batch = config.batch.prompts * config.rollout.group
    job = {
        "max_steps": a.warm + a.steps,
        "num_generations": config.rollout.group,
        "per_device_train_batch_size": min(a.rows, batch),
        "gradient_accumulation_steps": batch // min(a.rows, batch),
        "max_completion_length": config.rollout.max_tokens,
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "top_k": config.rollout.top_k,
        "loss_type": "grpo",
        "beta": config.sections["grpo"].kl,
        "epsilon": config.sections["grpo"].clip_low,
        "epsilon_high": config.sections["grpo"].clip_high,
        "learning_rate": config.optim.lr,
        "lr_scheduler_type": config.optim.schedule,
        "adam_beta1": config.optim.beta1,
        "adam_beta2": config.optim.beta2,
        "adam_epsilon": config.optim.eps,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.clip,
        "seed": config.seed,
    }
    speed = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": GPU,
        "vllm_gpu_memory_utilization": LEFT[a.weights],
        "vllm_max_model_length": config.data.max_tokens,
        "generation_kwargs": {"detokenize": False},  # TRL decodes the tokens itself
        "bf16": GPU,
        "use_cpu": not GPU,
        "gradient_checkpointing": False,
        "use_liger_kernel": GPU and importlib.util.find_spec("liger_kernel") is not None,
        "model_init_kwargs": {"dtype": a.weights},
    }
    quiet = {
        "output_dir": str(a.out / "trl"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {**job, **speed, **quiet, **dict(map(pair, a.trl))}


def pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def folder(a: argparse.Namespace, seed: int) -> Path:
    """Write our run's model for TRL: weights as files, and a tokenizer that transformers can read."""
    path = a.out / "trl" / "model"
    path.mkdir(parents=True, exist_ok=True)
    dtype = "bfloat16" if GPU else "float32"
    Tokenizer.load(a.out / "model").save(path)
    (path / "config.json").write_text(
        json.dumps({**json.loads((a.out / "model" / "config.json").read_text()), "dtype": dtype})
    )
    if not (path / "model.safetensors").exists():
        demo_task.make_weights(path, seed, dtype, "cuda" if GPU else "cpu")
    return path


def theirs(a: argparse.Namespace, config: Config, settings: dict[str, Any]) -> dict[str, float]:
    """Return the means over the counted steps of TRL's trainer."""
    for name in record.WORLD:  # else accelerate wraps the model for several ranks; the port may be in use
        os.environ.pop(name, None)
    model = folder(a, config.seed)
    if not GPU:
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # TRL has no option for eager mode
    from rlhf.rollout.vllm import vllm_private  # before TRL: it sets variables that vLLM reads at import

    if not GPU:
        vllm_private.adapt_to_cpu()
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts = Dataset.from_json(list(config.data.train), cache_dir=str(a.out / "trl" / "cache"))
    trainer = GRPOTrainer(str(model), coin, GRPOConfig(**settings), prompts)
    spent: dict[str, list[float]] = {"_generate": [], "_generate_and_score_completions": []}
    for name, seconds in spent.items():
        setattr(trainer, name, timed(getattr(trainer, name), seconds))
    ends = step_ends(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "num_tokens" in log]
    assert len(logs) == a.warm + a.steps, f"TRL logged {len(logs)} steps, not {a.warm + a.steps}"
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    counted = slice(a.warm, None)
    totals = [0.0, *(log["num_tokens"] for log in logs)]
    seconds = mean([end - start for start, end in pairwise(ends)][counted])
    rollout, sampled = (mean(spent[name][counted]) for name in spent)
    tokens = mean([after - before for before, after in pairwise(totals)][counted])
    return {
        "seconds": seconds,
        "rollout": rollout,
        "score": sampled - rollout,
        "learn": seconds - sampled,
        "tokens": tokens,
        "response_tokens": mean([log["completions/mean_length"] for log in logs][counted]),
        "mismatch": mean([log.get("sampling/sampling_logp_difference/mean", math.nan) for log in logs][counted]),
        "tokens_per_second": tokens / seconds,
        "peak_gib": record.peak_gib(),
    }


def coin(completions: list[str], **about: Any) -> list[float]:
    return [demo_task.noise("", completion, {}) for completion in completions]


def timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, wrapped so that each call appends its seconds to the list."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        record.wait()
        start = time.perf_counter()
        result = work(*args, **kwargs)
        record.wait()
        seconds.append(time.perf_counter() - start)
        return result

    return wrapper


def step_ends(trainer: Any) -> list[float]:
    """Return a list that gets the time when training begins, and when each step ends."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            record.wait()
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    trainer.add_callback(Clock())
    return ends


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    a = options()
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed: pip install trl==1.16.0 datasets")
    a.out = a.out.resolve()
    arch = replace(step.SIZES[a.model], layers=a.layers)
    first = ours(a, arch)
    print(f"ours: {first['seconds']:.2f} s a step, {first['tokens_per_second']:,.0f} tokens/s", flush=True)
    config = configuration.load("grpo", [str(a.out / "run" / "config.toml")])
    settings = arguments(a, config)
    second = theirs(a, config, settings)
    about = {"model": a.model, "layers": a.layers, "parameters": arch.num_parameters(), "steps": a.steps}
    about |= {"prompts": config.batch.prompts, "group": config.rollout.group, "trl": version("trl")}
    about |= {
        name: settings[name] for name in ("per_device_train_batch_size", "gradient_checkpointing", "use_liger_kernel")
    }
    sides = {
        f"{side}/{name}": value for side, found in (("ours", first), ("trl", second)) for name, value in found.items()
    }
    ratio = first["tokens_per_second"] / second["tokens_per_second"]
    record.say("trl", f"grpo {a.model}, {a.weights}", {**about, **sides, "ratio": ratio})
    os._exit(0)  # at a normal exit vLLM and torch.distributed would destroy each other's groups


if __name__ == "__main__":
    main()
