"""Every key that the modes share: its default and its meaning. TOML files first, then key=value overrides; --help prints this file.

A new key is one line here: name, type, default, comment. Unknown keys and wrong types are errors that name the key. The keys of an
algorithm are a section beside its class (rlhf.algorithms), in the same form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True, slots=True)
class Between:
    """The least and the largest value that a number may have, or the number of members of a list. Without it, these."""

    least: float = 0
    most: float = 2**31 - 1  # numpy, torch and vLLM keep what counts something in 32 bits


Count = Annotated[int, Between(1)]
Share = Annotated[float, Between(0.01, 1)]
Rate = Annotated[float, Between(0, 10)]
Decay = Annotated[float, Between(0, 0.99999)]
Formats = Annotated[tuple[Literal["hf", "mcore", "mcore-local", "legacy", "torch_dist"], ...], Between(1)]
# Tensor-parallel ranks that exchange hidden states beside products, at most: eight were slower than megatron-core (benchmarks/NOTES.md).
EXCHANGERS = 4
CPU_CACHE = 0.25  # GiB of KV cache on a CPU, where rollout.cache is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The model that learns."""

    load: str = ""  # model folder: config.json, weights, tokenizer
    init: Literal["load", "random"] = "load"  # random: shapes from config.json, weights from the seed
    tokenizer: str = ""  # folder or tokenizer.model file; empty: the one in policy.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The frozen model that KL and preferences are measured to."""

    load: str = ""  # model folder; empty: policy.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """The model that predicts returns (mode rlhf)."""

    load: str = ""  # model folder; empty: reward.load. One without a scalar head gets a head of zeros
    lr: Rate = 0.0  # peak learning rate; 0: optim.lr


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How training splits the ranks. What tp, pp and cp leave over is data parallel."""

    tp: Count = 1  # tensor parallel: ranks that split every matrix
    pp: Count = 1  # pipeline parallel: ranks that split the layers
    cp: Count = 1  # context parallel: ranks that split long sequences
    dp: int = 0  # data parallel: ranks that split the batch; 0: whatever ranks are left (1 on a CPU)
    sp: bool = True  # sequence parallel: with tp > 1, norms and residuals are split over tokens
    zero: bool = True  # distributed optimizer: its state is split over the data-parallel ranks
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in backward: attention or all

    @property
    def exchanges(self) -> bool:
        """Whether tensor-parallel ranks may cut products (rlhf.model.linear); the devices decide (rlhf.parallel.exchange.pays)."""
        return self.sp and 1 < self.tp <= EXCHANGERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Where prompts and responses come from, and how they become tokens."""

    train: str = ""  # jsonl file or folder of them (.gz too)
    eval: str = ""  # held-out file or folder; empty: no evaluation
    template: Literal["plain", "human", "llama2", "chatml", "tokenizer"] = "plain"  # how turns become text
    learn: Literal["all", "last"] = "all"  # turns of the assistant that are learned in a conversation: all, or the last alone
    overlong: Literal["error", "truncate", "drop"] = "error"  # samples over the limits; truncate cuts prompts from the left
    max_tokens: Count = 2048  # prompt and response together, in tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step consumes."""

    prompts: Count = 64  # prompts (sft: records) per step, over all ranks
    minibatches: Count = 1  # optimizer updates that the samples of a step are cut into
    epochs: Count = 1  # passes over the samples of a step
    tokens: Count = 8192  # packed tokens in a micro-batch, before context parallelism splits them


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """AdamW in float32, whatever the compute dtype."""

    lr: Rate = 1e-6  # peak learning rate
    min_lr: Rate = 0.0  # learning rate at the end of the schedule
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # updates of linear warm-up from zero
    beta1: Decay = 0.9  # AdamW's first moment
    beta2: Decay = 0.95  # AdamW's second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # on matrices; norms and biases are never decayed
    clip: float = 1.0  # largest global gradient norm; 0: no clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How responses are sampled."""

    engine: Literal["vllm", "kvcache"] = "vllm"  # kvcache: plain torch, an oracle and a fallback
    tp: Count = 1  # ranks that share one engine; the world holds world / tp engines
    group: Count = 8  # responses per prompt
    max_tokens: Count = 512  # longest response, with what an environment says in it
    temperature: Annotated[float, Between(0, 100)] = 1.0  # of sampling, and of the learner's log-probs with it
    top_p: Share = 1.0  # nucleus sampling; 1: off
    top_k: int = 0  # sample among the k likeliest; 0: off
    stop: tuple[str, ...] = ()  # strings that end a response, which is cut behind them
    environment: str = ""  # answers the model's turns: module:Class or path/file.py:Class (docs/environments.md); empty: nothing does
    turns: Count = 8  # of the model in a response, at most (environment)
    memory: Share = 0.5  # share of the device's memory for the engine (GPU)
    cache: float = 0.0  # GiB of KV cache; 0: what memory leaves (GPU), or 0.25 (CPU)
    inflight: Annotated[float, Between(1)] = 1.0  # groups being generated, in batch.prompts; above 1 no step waits for the longest ones
    max_lag: Count = 4  # steps after which a group that is in flight is learned at the latest (inflight > 1)
    rounds: Count = 1  # sampling rounds per step, at most, until batch.prompts groups have unequal rewards (DAPO)
    bucket: Count = 512  # MB of extra memory, at most, for weights that cross ranks in a publish
    check: bool = False  # after every publish compare checksums of all weights, and log-probs with the learner's


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What stays on the device. --dry-run prints the ledger: every tenant in every phase."""

    device: float = 0.0  # GiB of one device; 0: what it says itself (--dry-run: 80)
    offload: Literal["auto", "none", "all"] = "auto"  # to host memory between phases; auto: what must go so that each phase fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a response is worth."""

    function: str = ""  # math, or module:function(prompt, response, record) -> float; empty: math, without load and environment
    load: str = ""  # folder of a reward model, whose score is the reward; with a function too: the sum of both
    timeout: Annotated[float, Between(0.01)] = 10.0  # seconds for a response, or step of an environment; over it: 0 and failed
    workers: Annotated[int, Between(1, 256)] = 2  # killable processes per rank that run rewards, and as many for environments
    memory: float = 0.0  # GiB of data that each of these may have, and each process that it starts; 0: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What survives the process."""

    every: int = 100  # steps between checkpoints; the last step always makes one; 0: only the last
    keep: Count = 2  # newest checkpoints kept; older ones are deleted
    export: bool = True  # write the trained model as a folder of weights into each checkpoint too, not only into the last
    format: Formats = ("hf",)  # of these folders: hf, mcore (Transformer Engine's names), mcore-local, legacy, torch_dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """How progress is measured on held-out records."""

    every: int = 50  # steps between evaluations; 0: only before the first and after the last step
    function: str = ""  # reward of held-out responses (eval_reward), as in reward.function; empty: the training reward
    prompts: int = 256  # records used; 0: all
    temperature: Annotated[float, Between(0, 100)] = 0.0  # of the responses; 0: greedy
    show: int = 2  # sample rollouts printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Where numbers go."""

    tensorboard: bool = False  # event files beside metrics.jsonl (pip install tensorboard)
    every: Count = 1  # steps between terminal lines
    samples: Annotated[int, Between(-1)] = 16  # responses of each step, and of its evaluation, kept in out/samples; 0: none, -1: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. Frozen after loading."""

    mode: str = "sft"  # set by the command line
    out: str = ""  # folder for checkpoints, metrics.jsonl, config.toml; evaluate writes files of its own there; empty: runs/MODE
    steps: Count = 100  # steps in all; a resumed run counts on from its checkpoint
    seed: Annotated[int, Between(0, 2**32 - 1)] = 1  # data order, sampling and random weights all derive from it
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of weights and activations; auto: bfloat16 on a GPU, else float32
    resume: bool = True  # continue from the newest checkpoint in out, if there is one
    policy: Policy = field(default_factory=Policy)
    reference: Reference = field(default_factory=Reference)
    critic: Critic = field(default_factory=Critic)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    rollout: Rollout = field(default_factory=Rollout)
    memory: Memory = field(default_factory=Memory)
    reward: Reward = field(default_factory=Reward)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)
    sections: Mapping[str, Any] = field(default_factory=dict)  # of the algorithms: name -> their Keys
