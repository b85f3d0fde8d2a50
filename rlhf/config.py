"""The configuration keys that all modes share, with their defaults and meanings. --help prints this file.

A key is one line: name, type, default, comment. The comment is the help text. An unknown key or a wrong type is an
error that names the key. The keys of an algorithm have the same form and are in its file (rlhf.algorithms).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True, slots=True)
class Between:
    """Limits of a number, or of the length of a list. The defaults below hold for a number without its own limits."""

    least: float = 0
    most: float = 2**31 - 1  # numpy, torch and vLLM store counts in 32 bits


Count = Annotated[int, Between(1)]
Share = Annotated[float, Between(0.01, 1)]
Rate = Annotated[float, Between(0, 10)]
Decay = Annotated[float, Between(0, 0.99999)]
Retries = Annotated[int, Between(0, 100)]
Weights = Annotated[Mapping[str, float], Between(-1e6, 1e6)]
Shares = Annotated[Mapping[str, float], Between(1e-6, 1e6)]
Formats = Annotated[tuple[Literal["hf", "mcore", "mcore-local", "legacy", "torch_dist"], ...], Between(1)]
TrackerNames = tuple[Literal["tensorboard", "wandb", "mlflow"], ...]
Template = Literal["auto", "plain", "human", "llama2", "chatml", "tokenizer"]
# Up to this tensor parallel size, ranks exchange hidden states during matrix products (rlhf.parallel.exchange).
# With eight ranks this was slower than megatron-core's layers (benchmarks/NOTES.md).
EXCHANGERS = 4
JUDGE = "judge"  # the reward function that asks a judge (rlhf.judge.rubric.Rubric)
CPU_CACHE = 0.25  # GiB of KV cache on a CPU if rollout.cache is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy: the model that is trained."""

    load: str = ""  # folder of a model (config.json, weights, tokenizer), or of a run: its newest export
    init: Literal["load", "random"] = "load"  # random: random weights from the seed, shapes from config.json
    tokenizer: str = ""  # folder or tokenizer.model file; empty: the tokenizer in policy.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The reference: the frozen model against which KL and preferences are measured."""

    load: str = ""  # model folder; empty: same as policy.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """The critic: the model that predicts returns (mode rlhf)."""

    load: str = ""  # model folder; empty: same as reward.load. A model without a scalar head gets one with zero weights
    lr: Rate = 0.0  # peak learning rate; 0: same as optim.lr


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How training splits the ranks. The data parallel size is the number of ranks divided by tp x pp x cp."""

    tp: Count = 1  # tensor parallel size: the number of ranks that split each matrix
    pp: Count = 1  # pipeline parallel size: the number of ranks that split the layers
    cp: Count = 1  # context parallel size: the number of ranks that split each sequence
    dp: int = 0  # data parallel size; 0: all ranks that are left (1 on a CPU)
    sp: bool = True  # sequence parallel: with tp > 1, split the tokens of norms and residuals too
    zero: bool = True  # distributed optimizer: split its state over the data-parallel ranks
    recompute: Literal["none", "selective", "full"] = "none"  # recompute activations: of attention, or all

    @property
    def exchanges(self) -> bool:
        """Whether the layers of rlhf.model.linear may be used. See also exchange.pays() of rlhf.parallel."""
        return self.sp and 1 < self.tp <= EXCHANGERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The data sets, and how their lines become tokens."""

    train: tuple[str, ...] = ()  # training data: jsonl, JSON or parquet file or folder, or a list (docs/data.md)
    weights: Shares = field(default_factory=dict)  # of several sets in train, as data.weights.NAME=2; else 1
    eval: tuple[str, ...] = ()  # held-out data: file or folder, or a list; empty: no evaluation
    template: Template = "auto"  # how messages become text; auto: tokenizer (its own template), but plain for texts
    template_variables: tuple[str, ...] = ()  # for the tokenizer's chat template, such as enable_thinking=false
    learn: Literal["all", "last"] = "all"  # train on all assistant turns of a conversation, or on the last only
    overlong: Literal["error", "truncate", "drop"] = "error"  # samples over max_tokens; truncate cuts the prompt's left
    max_tokens: Count = 2048  # limit of prompt and response together, in tokens
    invalid: Literal["error", "skip"] = "error"  # lines that cannot be used; skip: leave out up to half of the lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The size of a step, and how it is divided."""

    prompts: Count = 64  # prompts (sft: records) per step, over all ranks
    minibatches: Count = 1  # mini-batches per epoch; each one is one optimizer update
    epochs: Count = 1  # passes over the samples of a step
    tokens: Count = 8192  # limit of tokens in a packed micro-batch, before context parallelism splits it


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """The optimizer: AdamW. Its state is float32 for every dtype of the weights."""

    lr: Rate = 1e-6  # peak learning rate
    min_lr: Rate = 0.0  # learning rate at the end of the schedule
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, after the warm-up
    warmup: int = 0  # updates during which the learning rate rises linearly from 0
    beta1: Decay = 0.9  # decay rate of AdamW's first moment
    beta2: Decay = 0.95  # decay rate of AdamW's second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # weight decay of matrices; norms and biases have none
    clip: float = 1.0  # limit of the global gradient norm; 0: no clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How the engine samples responses."""

    engine: Literal["vllm", "kvcache"] = "vllm"  # kvcache: a small engine in plain torch, for tests and as a fallback
    tp: Count = 1  # tensor parallel size of an engine; there are (number of ranks) / tp engines
    group: Count = 8  # responses per prompt
    max_tokens: Count = 512  # limit of response tokens, including the answers of an environment
    temperature: Annotated[float, Between(0, 100)] = 1.0  # used for sampling, and for the learner's log-probs too
    top_p: Share = 1.0  # nucleus sampling; 1: off; below 1, mismatch is not measured, and mismatch_cap must be 0
    top_k: int = 0  # sample only from the k most likely tokens; 0: off; else mismatch is as with top_p < 1
    stop: tuple[str, ...] = ()  # strings that end a response; the string is kept in the response
    environment: str = ""  # module:Class or path/file.py:Class (docs/environments.md); empty: single-turn responses
    turns: Count = 8  # limit of the model's turns in a response (with an environment)
    memory: Share = 0.5  # share of the device's memory that the engine uses (GPU)
    cache: float = 0.0  # GiB of KV cache; 0: the rest of rollout.memory (GPU), or 0.25 (CPU)
    inflight: Annotated[float, Between(1)] = 1.0  # groups in flight, in units of batch.prompts (docs/rollouts.md)
    max_lag: Count = 4  # a group is trained on at most this many steps after the step in which it began (inflight > 1)
    rounds: Count = 1  # limit of sampling rounds per step, to find batch.prompts groups with unequal rewards (DAPO)
    bucket: Count = 512  # limit of buffer memory in MB for weights that a publish sends between ranks
    check: bool = False  # after each publish, compare all weights (by checksum) and log-probs with the learner's

    @property
    def filters(self) -> bool:
        """Whether top_p or top_k is on. Engines return log-probs after these filters; the learner's have none."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Device memory. --dry-run prints the memory that each part of the run uses in each phase."""

    device: float = 0.0  # GiB of one device; 0: ask the device (--dry-run: 80)
    offload: Literal["auto", "none", "all"] = "auto"  # move to host memory when unused; auto: as needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """How a response is rewarded."""

    function: tuple[str, ...] = ()  # math, judge, module:function, or a list; empty: math, or only load or environment
    weights: Weights = field(default_factory=dict)  # of functions and of parts, as reward.weights.NAME=0.5; else 1
    load: str = ""  # folder of a reward model; with a function too, the reward is the sum of both
    max_failed: Annotated[float, Between(0, 1)] = 0.5  # a larger share of failed rewards in a step ends the run
    timeout: Annotated[float, Between(0.01)] = 10.0  # seconds per call of own functions and environments; later: failed
    workers: Annotated[int, Between(1, 256)] = 2  # processes per rank and function, and as many for environments
    concurrency: Annotated[int, Between(1, 4096)] = 64  # responses at a time per process: async or batched functions
    memory: float = 0.0  # limit in GiB of data per such process, and per process that it starts; 0: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A language model that grades responses, at an OpenAI-compatible endpoint (docs/judges.md)."""

    url: str = ""  # address of the endpoint, such as http://localhost:8000/v1
    model: str = ""  # name of the judge at the endpoint; empty: the only model that the endpoint has
    key: str = "OPENAI_API_KEY"  # name of the environment variable with the API key; it may be unset
    concurrency: Annotated[int, Between(1, 4096)] = 32  # requests at a time, of each rank
    timeout: Annotated[float, Between(0.01)] = 120.0  # seconds per request
    retries: Retries = 6  # further tries after a timeout, a lost connection, or status 408, 409, 429 or 5xx
    max_tokens: Count = 2048  # limit of a judge's answer, in tokens
    rubric: str = ""  # file with the rubric of reward.function=judge


@dataclass(frozen=True, slots=True, kw_only=True)
class MTBench:
    """MT-Bench: a judge grades the answers to questions of two turns (docs/evaluation.md)."""

    models: tuple[str, ...] = ()  # FOLDER or NAME=FOLDER, or FastChat's files of answers; empty: policy.load
    references: str = ""  # FastChat's file of reference answers for the judge; empty: those in the questions
    prompts: str = ""  # file with the judge's prompts, such as FastChat's judge_prompts.jsonl; empty: own ones
    pairwise: bool = False  # compare the models in pairs, in both orders, and do not grade single answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Checkpoints, and the export of the trained model."""

    every: int = 100  # steps between checkpoints; the last step always writes one; 0: only the last step
    background: bool = True  # write files while the next steps run, from a copy in host memory
    keep: Count = 2  # how many checkpoints to keep; older ones are deleted
    export: bool = True  # export the trained model with each checkpoint, not only with the last
    format: Formats = ("hf",)  # of an export: hf, mcore (Transformer Engine's names), mcore-local, legacy, torch_dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Evaluation on held-out records."""

    every: int = 50  # steps between evaluations; 0: only before the first and after the last step
    function: tuple[str, ...] = ()  # as reward.function, for held-out responses; empty: the training reward
    prompts: int = 256  # how many records of each held-out set to use; 0: all
    samples: Count = 1  # responses per prompt; above 1: pass@k and majority too (docs/evaluation.md)
    temperature: Annotated[float, Between(0, 100)] = 0.0  # sampling temperature; 0: greedy
    show: int = 2  # how many responses of each held-out set to print


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Logs."""

    to: TrackerNames = ()  # trackers that also get metrics and samples: tensorboard, wandb, mlflow (docs/trackers.md)
    every: Count = 1  # steps between lines on the terminal
    samples: Annotated[int, Between(-1)] = 16  # responses per step, and per held-out set, in out/samples; -1: all
    report: bool = True  # write out/report.html after evaluations and at the end (docs/report.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """The end of a run in which no rank makes progress (docs/faults.md). The exit code is then 76."""

    timeout: float = 1800.0  # seconds without progress of any rank after which the run is ended; 0: never
    start: Annotated[float, Between(1)] = 3600.0  # the same before the first step: for loading, and for vLLM to start
    requeue: bool = False  # on Slurm, requeue the job after such an end


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The configuration of one run."""

    mode: str = "sft"  # set by the command line
    out: str = ""  # folder for checkpoints, metrics, samples and config.toml; empty: runs/MODE
    steps: Count = 100  # total number of steps, including those before a resume
    epochs: Annotated[float, Between(0, 10000)] = 0.0  # passes over data.train (docs/data.md); 0: steps is used
    seed: Annotated[int, Between(0, 2**32 - 1)] = 1  # decides data order, sampling and random weights
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # weights and activations; auto: bfloat16 on GPU
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
    judge: Judge = field(default_factory=Judge)
    mtbench: MTBench = field(default_factory=MTBench)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)
    watchdog: Watchdog = field(default_factory=Watchdog)
    sections: Mapping[str, Any] = field(default_factory=dict)  # of the algorithms: section name -> its Keys
