"""Every knob, its default, its meaning. TOML files first, then key=value overrides; --help prints this file.

A new knob is one line here: name, type, default, comment. Unknown keys and wrong types are errors that name the key.
"""

from dataclasses import dataclass, field
from typing import Literal

MODES = {
    "sft": "supervised fine-tuning on prompts and responses",
    "reward": "reward model: a scalar head learns which of a prompt's responses people prefer",
    "rlhf": "PPO: sample, score with the reward model, update policy and critic (also called ppo)",
    "dpo": "direct preference optimisation on pairs of responses",
    "online-dpo": "DPO on pairs that the policy samples and the reward ranks",
    "grpo": "group relative policy optimisation: sample, verify, update",
    "evaluate": "generate with the engine from a Hugging Face folder and score the responses",
}
# Tensor-parallel ranks that exchange hidden states beside products, at most: eight were slower than megatron-core (benchmarks/NOTES.md).
EXCHANGERS = 4


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
    lr: float = 0.0  # peak learning rate; 0: optim.lr


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How training splits the ranks. What tp, pp and cp leave over is data parallel."""

    tp: int = 1  # tensor parallel: ranks that split every matrix
    pp: int = 1  # pipeline parallel: ranks that split the layers
    cp: int = 1  # context parallel: ranks that split long sequences
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
    max_tokens: int = 2048  # prompt and response together, in tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step consumes."""

    prompts: int = 64  # prompts (sft: records) per step, over all ranks
    minibatches: int = 1  # optimizer updates that the samples of a step are cut into
    epochs: int = 1  # passes over the samples of a step
    tokens: int = 8192  # packed tokens in a micro-batch, before context parallelism splits them


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """AdamW in float32, whatever the compute dtype."""

    lr: float = 1e-6  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the schedule
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # updates of linear warm-up from zero
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # on matrices; norms and biases are never decayed
    clip: float = 1.0  # largest global gradient norm; 0: no clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How responses are sampled."""

    engine: Literal["vllm", "kvcache"] = "vllm"  # kvcache: plain torch, an oracle and a fallback
    tp: int = 1  # ranks that share one engine; the world holds world / tp engines
    group: int = 8  # responses per prompt
    max_tokens: int = 512  # longest response
    temperature: float = 1.0  # of sampling, and of the learner's log-probs with it
    top_p: float = 1.0  # nucleus sampling; 1: off
    top_k: int = 0  # sample among the k likeliest; 0: off
    stop: tuple[str, ...] = ()  # strings that end a response, which is cut behind them
    memory: float = 0.5  # share of the device's memory for the engine (GPU)
    cache: float = 0.0  # GiB of KV cache; 0: what memory leaves (GPU), or 0.25 (CPU)
    rounds: int = 1  # sampling rounds per step, at most, until batch.prompts groups have unequal rewards (DAPO)
    bucket: int = 512  # MB of extra memory, at most, for weights that cross ranks in a publish
    check: bool = False  # after every publish compare checksums of all weights, and log-probs with the learner's


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What stays on the device. --dry-run prints the ledger: every tenant in every phase."""

    device: float = 0.0  # GiB of one device; 0: what it says itself (--dry-run: 80)
    offload: Literal["auto", "none", "all"] = "auto"  # to host memory between phases; auto: what must go so that each phase fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a response is worth."""

    function: str = ""  # math (verifies the answer), or module:function(prompt, response, record) -> float; empty: math, unless load is set
    load: str = ""  # folder of a reward model, whose score is the reward; with a function too: the sum of both
    timeout: float = 10.0  # seconds for one response; beyond that it scores 0 and counts as failed
    workers: int = 2  # killable processes per rank that run rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class RM:
    """Reward modelling (2203.02155): Bradley-Terry over the ordered pairs of each prompt's scored responses."""

    margin: float = 0.0  # times the difference of the given scores: by how much the better response must win (2307.09288)
    lm: float = 0.0  # weight of the language-model loss on the best response of each prompt; 0 needs no output layer


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO:
    """Proximal policy optimisation with a critic (1707.06347, 2203.02155)."""

    clip_low: float = 0.2  # ratio >= 1 - clip_low
    clip_high: float = 0.2  # ratio <= 1 + clip_high
    value_clip: float = 0.2  # how far a value may move from its old one before its loss is clipped; 0: no clipping
    gamma: float = 1.0  # discount of returns
    lam: float = 0.95  # lambda of generalised advantage estimation (1506.02438)
    whiten: bool = True  # advantages of the step get mean 0 and deviation 1
    kl: float = 0.02  # coefficient of the KL to the reference in each token's reward; 0 needs no reference
    kl_kind: Literal["k1", "k2", "k3"] = "k1"  # estimator of that KL
    kl_target: float = 0.0  # KL of a whole response that the coefficient is adapted to (1909.08593); 0: it is fixed
    kl_horizon: float = 10000.0  # responses over which it adapts
    reward_clip: float = 0.0  # largest absolute reward of a response, after scaling; 0: no clipping
    reward_scale: bool = False  # divide rewards by their running standard deviation
    ngram: int = 0  # a token that completes an n-gram of this length again is penalised; 0: none
    ngram_penalty: float = 1.0  # by this much
    critic_warmup: int = 0  # steps in which the critic alone learns


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """Direct preference optimisation (2305.18290), offline and online (2402.04792)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: 2310.12036
    beta: float = 0.1  # strength of the pull to the reference
    smoothing: float = 0.0  # share of pairs taken to be labelled the wrong way round (cDPO)
    reference: bool = True  # false: log-probs themselves instead of their ratio to the reference (SimPO, 2405.14734)
    length_normalise: bool = False  # log-probs averaged over tokens instead of summed (SimPO)
    margin: float = 0.0  # of the rewards, by which the chosen response must win (SimPO's gamma)
    sft: float = 0.0  # weight of the language-model loss on the chosen response, averaged over its tokens
    pairs: Literal["best_worst", "all"] = "best_worst"  # online, of each group; ties teach nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPO:
    """Group relative policy optimisation (2402.03300) and its relatives."""

    advantage: Literal["std", "none", "leave_one_out", "global"] = "std"  # scale by the group's deviation, not (Dr.GRPO), RLOO, REINFORCE++
    ratio: Literal["token", "sequence"] = "token"  # sequence: one ratio per response, the geometric mean (GSPO, 2507.18071)
    objective: Literal["clip", "cispo"] = "clip"  # cispo: the clipped ratio is a constant weight of the log-prob (2506.13585)
    clip_low: float = 0.2  # ratio >= 1 - clip_low
    clip_high: float = 0.2  # ratio <= 1 + clip_high
    kl: float = 0.04  # weight of the KL to the reference in the loss; 0 needs no reference model
    kl_kind: Literal["k1", "k2", "k3"] = "k3"  # estimator of that KL
    mean: Literal["sequence", "token", "constant"] = "sequence"  # over each response first, all tokens (DAPO), or a fixed length (Dr.GRPO)
    mismatch_cap: float = 0.0  # cap of the weight learner / engine probability (truncated importance sampling); 0: off
    overlong: Literal["keep", "mask", "shape"] = "keep"  # cut responses: as others, not learned, or penalised towards the limit (DAPO)
    overlong_buffer: int = 0  # tokens before rollout.max_tokens over which the penalty grows from 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What survives the process."""

    every: int = 100  # steps between checkpoints; the last step always makes one; 0: only the last
    keep: int = 2  # newest checkpoints kept; older ones are deleted
    export: bool = True  # write the trained model as a folder of weights into each checkpoint too, not only into the last
    format: tuple[str, ...] = ("hf",)  # of these folders: hf, mcore (Transformer Engine's names), mcore-local, legacy, torch_dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """How progress is measured on held-out records."""

    every: int = 50  # steps between evaluations; 0: only before the first and after the last step
    function: str = ""  # reward of held-out responses (eval_reward), as in reward.function; empty: the training reward
    prompts: int = 256  # records used; 0: all
    temperature: float = 0.0  # of the responses; 0: greedy
    show: int = 2  # sample rollouts printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Where numbers go."""

    tensorboard: bool = False  # event files beside metrics.jsonl (pip install tensorboard)
    every: int = 1  # steps between terminal lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. Frozen after loading."""

    mode: str = "sft"  # set by the command line
    out: str = "runs/default"  # folder for checkpoints, metrics.jsonl, config.toml
    steps: int = 100  # steps in all; a resumed run counts on from its checkpoint
    seed: int = 1  # data order, sampling and random weights all derive from it
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
    rm: RM = field(default_factory=RM)
    ppo: PPO = field(default_factory=PPO)
    dpo: DPO = field(default_factory=DPO)
    grpo: GRPO = field(default_factory=GRPO)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)
