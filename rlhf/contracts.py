"""The data types of the project and the interfaces between its parts. Numpy and torch are imported at first use only.

Shape letters   T packed tokens of a micro-batch | S sequences in it | P spans | L predictions of one sample
Alignment       inputs = tokens[:-1], labels = tokens[1:]. A stream x has one value per prediction:
                x[t] belongs to labels[t]. Only pack() applies this shift. No other code shifts a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from rlhf.config import Config
from rlhf.lazy import np

if TYPE_CHECKING:
    from torch import Tensor

ABSENT: Any = None  # the value of a field that has not been written yet
AllSum = Callable[["Tensor"], "Tensor"]  # all-reduce (sum) with autograd over a process group; the identity on one rank
Sums = dict[str, tuple[float, float]]  # metric -> (sum, count)
Total = Callable[["np.ndarray"], "np.ndarray"]  # the sum of an array over all data-parallel replicas


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a sample, and the line of the data set that the sample comes from."""

    row: int = -1  # index of the line, counted over all files of its data set
    record: Mapping[str, Any] = field(default_factory=dict)  # the parsed line, for reward functions
    prompt: str = ""
    response: str = ""  # empty until a response is sampled; with several turns, the text of all turns
    turns: Sequence[Mapping[str, str]] = ()  # role and content of each turn; empty without an environment
    template: str = ""  # key of rlhf.data.templates.TEMPLATES that the prompt is written with
    set: str = ""  # name of the data set (rlhf.data.sets)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where the reward of a sampled response comes from. Sample.reward is the sum of rule and score."""

    rule: float = 0.0  # from the reward function and the environment
    score: float | None = None  # from the reward model; None without a reward model
    parts: Mapping[str, float] = field(default_factory=dict)  # of the reward functions' sum, without their weights
    failed: bool = False  # a reward function or the environment failed on this response: it is not learned


@dataclass(slots=True)
class Sample:
    """One prompt with one response. A prompt without a response is a sample whose mask is all False.

    A group is the set of all samples of one prompt. A preference pair is a group of two.
    """

    tokens: np.ndarray  # [L+1] int32, prompt then response
    mask: np.ndarray  # [L] bool, True where labels[t] is a response token to learn
    group: int  # number of the sample's group, unique within a step
    reward: float = 0.0  # of the response; offline: the score in the data set, or 1.0 for chosen and 0.0 for rejected
    truncated: bool = False  # the length limit ended the response, not the model
    text: Text = field(default_factory=Text)
    verdict: Verdict = field(default_factory=Verdict)

    # [L] int32, version of the weights that sampled labels[t]: the number of steps they were trained; -1: not sampled
    version: np.ndarray = ABSENT
    sampler_logp: np.ndarray = ABSENT  # [L] float32, log-probs that the engine computed
    old_logp: np.ndarray = ABSENT  # [L] float32, log-probs of the policy before this step's updates
    ref_logp: np.ndarray = ABSENT  # [L] float32, log-probs of the frozen reference model
    values: np.ndarray = ABSENT  # [L] float32, values of the critic before this step's updates
    advantages: np.ndarray = ABSENT  # [L] float32, written by Algorithm.credit
    returns: np.ndarray = ABSENT  # [L] float32, written by Algorithm.credit


class Grouped(Protocol):
    """A sample, or what is known about one."""

    @property
    def group(self) -> int: ...


G = TypeVar("G", bound=Grouped)


def groups(samples: Sequence[G]) -> list[list[G]]:
    """Return the samples as one list per group, in order of first appearance."""
    members: dict[int, list[G]] = {}
    for sample in samples:
        members.setdefault(sample.group, []).append(sample)
    return list(members.values())


def rewarded(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose rewards have not failed. Only these are scored and learned."""
    return [sample for sample in samples if not sample.verdict.failed]


def alone(x: np.ndarray) -> np.ndarray:
    """Return x: the Total of a single replica."""
    return x


def worth(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return rewards [S] as float32. All comparisons of rewards use this precision, so 0.1 + 0.2 equals 0.3."""
    return np.array(rewards, np.float32)


def differ(rewards: Sequence[float] | np.ndarray) -> bool:
    """Return whether the rewards of a group are not all equal. The group may be empty."""
    return len(rewards) > 0 and bool(np.ptp(worth(rewards)) > 0)


def scored(sample: Sample, pad: int | None = None) -> Sample:
    """Return the text up to its last token that is not `pad`, and this token again. The last value is the text's score.

    transformers reads the score of a classifier at the same token (of a text of pad tokens only: at the first one).
    Inputs are tokens[:-1], so the last token is repeated. It is only a label, and its log-prob is not used. The mask is
    True there, and all streams of the result are ABSENT.
    """
    last = int(np.flatnonzero(sample.tokens != pad).max(initial=0)) if pad is not None else len(sample.mask)
    tokens, mask = np.append(sample.tokens[: last + 1], sample.tokens[last]), np.append(sample.mask[:last], True)
    return replace(sample, tokens=tokens, mask=mask, **dict.fromkeys(STREAMS, ABSENT))


SCORED_BY = {"old_logp": "policy", "ref_logp": "reference", "values": "critic"}  # stream -> the role that computes it
STREAMS = ("sampler_logp", "old_logp", "ref_logp", "values", "advantages", "returns")


@dataclass(slots=True)
class Spans:
    """Which queries of a packed row attend to which keys. Attention is causal.

    Span i has q_lengths[i] queries that start at q_starts[i] in this rank's slice of the row. It has k_lengths[i] keys
    that start at k_starts[i] in the whole row. Its last query attends to its last key (bottom-right alignment).
    Without context parallelism (CP), a span is a sequence. With CP, it is the part of a sequence inside one chunk.
    """

    q_starts: list[int]  # [P]
    q_lengths: list[int]  # [P]
    k_starts: list[int]  # [P]
    k_lengths: list[int]  # [P], k_lengths[i] >= q_lengths[i]


@dataclass(slots=True)
class Batch:
    """One packed micro-batch on one rank. With CP, T counts the tokens of this rank's slice."""

    inputs: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    positions: Tensor  # [T] int64, index of the token in its sequence
    places: Tensor  # [T] int64, index of the token in the whole row
    spans: Spans
    mask: Tensor  # [T] float32, 1.0 where labels[t] is learned
    last: Tensor  # [T] float32, 1.0 at each sequence's last learned token
    segment: Tensor  # [T] int64, index of the token's sequence (padding: S)
    group: Tensor  # [S] int64
    reward: Tensor  # [S] float32
    # [2, pairs] int64: indices of the better and the worse response, for all pairs of one group whose rewards differ
    pairs: Tensor
    streams: dict[str, Tensor]  # name in STREAMS -> [T] float32
    cp_sum: AllSum = lambda x: x  # all-reduce (sum) over the CP ranks

    def seq_sum(self, x: Tensor) -> Tensor:
        """Return the sum of x [T] over the learned tokens of each sequence [S]. With CP, the sum covers all slices."""
        return self.cp_sum(self._by_sequence(x * self.mask))

    def owned(self) -> Tensor:
        """Return [S]: 1.0 for each sequence whose last learned token is on this rank, else 0.0.

        With CP, seq_sum() gives every rank the whole sum, and losses and counts are later summed over the ranks.
        So only the owner may count a value that belongs to a whole sequence.
        """
        return self._by_sequence(self.last)

    def _by_sequence(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.group) + 1).index_add(0, self.segment, x)[:-1]

    def at_last(self, x: Tensor) -> Tensor:
        """Return x [T] at the last learned token of each sequence [S], on all CP ranks."""
        return self.seq_sum(x * self.last)


@dataclass(slots=True)
class Output:
    """The output of a model for a Batch. Algorithms never get logits."""

    logp: Tensor = ABSENT  # [T] float32, log p(labels[t]) at the rollout's temperature
    entropy: Tensor = ABSENT  # [T] float32, of the same distribution
    # [T] float32, output of the scalar head (critic, reward model) at inputs[t], so it does not depend on labels[t]
    value: Tensor = ABSENT


@dataclass(slots=True)
class Loss:
    """The loss of a micro-batch as a sum and a count.

    The learner divides by the global count, so the loss does not depend on the split into ranks and micro-batches.
    """

    total: Tensor  # [] sum over this rank's units
    count: Tensor  # [] number of units: tokens, sequences or pairs
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum, count)


Form = Literal[
    "demonstrations", "scored", "pairs", "prompts", "questions"
]  # the kind of a data set's lines (rlhf.data.forms)


class Algorithm:
    """A mode of the package, such as "grpo": its properties, and its part of the shared loop.

    Class attributes hold for every run of the mode. Instance attributes depend on the configuration. The rest of the
    package reads everything that it needs to know about a mode from here. credit() and loss() only compute on tensors.
    They use no process groups, engines or files.
    """

    summary: ClassVar[str]  # the mode's line in --help
    form: ClassVar[Form]  # the kind of data set lines that the mode reads
    aliases: ClassVar[tuple[str, ...]] = ()  # other names of the mode on the command line
    # name and dataclass of the mode's section in the configuration; two modes may share a section
    section: ClassVar[tuple[str, type] | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}  # key of the configuration -> default of the mode, if it has its own
    trains: ClassVar[bool] = True  # True: the mode trains a model on data.train. False: it reads data.eval only
    online: ClassVar[bool] = False  # samples come from an engine, not from the data set
    whole_groups: ClassVar[bool] = False  # all samples of a group must be in the same micro-batch (pairwise losses)
    # the loss corrects for tokens that were sampled with older weights than the policy's (rollout.inflight)
    weighs: ClassVar[bool] = False
    aligns: ClassVar[bool] = True  # the mode starts from a fine-tuned model; False for sft and reward
    judged: ClassVar[bool] = False  # a judge grades the responses after the run, so the run computes no rewards
    rule: ClassVar[str] = ""  # usual reward function of the mode; empty: a reward model

    models: Mapping[str, Literal["train", "frozen"]] = {}  # by role; the run exports the first trained model
    with_lm: tuple[str, ...] = ()  # roles with a scalar head that also need their output layer
    streams: tuple[str, ...] = ()  # streams to compute before credit(): "old_logp", "ref_logp", "values"
    warmup: Mapping[str, int] = {}  # role -> steps before its first update
    state: dict[str, float]  # numbers that credit() carries from step to step; checkpoints save them

    def __init__(self, config: Config):
        """Raises UserError if keys contradict each other."""
        self.state = {}

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        """Turn rewards into advantages (or pairs). Return the samples to learn from, and their metrics.

        `samples` is one data-parallel replica's share of the step: whole groups, or nothing. Samples without a reward
        are left out, so a group may have any size. total(x) sums an array x over the shares of all replicas, which have
        at least one sample together. All replicas must call it equally often, with arrays of equal shapes. All replicas
        must compute the same `state`.
        """
        return samples, {}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        """Return the loss of `role` on one micro-batch. The samples of the role "reward" are results of scored()."""
        raise NotImplementedError


@dataclass(slots=True, frozen=True)
class Sampling:
    """How an engine samples tokens. temperature=0 is greedy. top_p=1 and top_k=0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()  # generation ends after one of these tokens, which stays in the response


@dataclass(slots=True)
class Completion:
    """The response of an engine to one prompt."""

    tokens: list[int]  # the response, including the stop token that ended it
    logp: list[float]  # log-prob of each token at the sampling temperature
    finish: str  # "stop" (a stop token was sampled) | "length" (cut by a limit) | "held" (withdrawn, incomplete)


@dataclass(slots=True)
class Request:
    """A prompt for an engine to continue."""

    key: int  # chosen by the caller, unique among the engine's unfinished requests
    prompt: list[int]
    sampling: Sampling
    seed: int  # the random numbers depend on the seed alone; 0 <= seed < 2**63
    # called with the response after every token; True: the response is complete (it contains a stop string)
    ends: Callable[[list[int]], bool] | None = None


class Engine(ABC):
    """Generates responses with its current parameters. A publish overwrites these parameters in place.

    An engine works in steps, so a response can be used as soon as it is complete. All ranks of an engine must make the
    same calls.
    """

    @abstractmethod
    def submit(self, requests: list[Request]) -> None:
        """Add requests to the end of the queue. A prompt must not be empty and must leave room for one token."""

    @abstractmethod
    def advance(self) -> list[tuple[int, Completion]]:
        """Sample one token for each running request. Return the requests that this completed, as (key, completion)."""

    @abstractmethod
    def withdraw(self) -> list[tuple[int, Completion]]:
        """Drop all unfinished requests. Return the tokens sampled for each so far, as (key, completion).

        Their finish is "held". A completion may be empty.
        """

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's shards by the engine's own names. They are valid from wake_weights() until sleep()."""

    @abstractmethod
    def sleep(self) -> None:
        """Free the device memory. Weights and KV cache are lost. The engine must have no unfinished requests."""

    @abstractmethod
    def wake_weights(self) -> None:
        """Allocate parameters() again. Their content is undefined until the next publish."""

    @abstractmethod
    def wake(self) -> None:
        """Prepare to generate with the current parameters. Drop all cache entries of older weights."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Completion]:
        """Return one completion per prompt, in order. The engine must have no other requests."""
        assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
        self.submit(
            [Request(i, prompt, sampling, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        )
        found: dict[int, Completion] = {}
        while len(found) < len(prompts):
            found.update(self.advance())
        return [found[i] for i in range(len(prompts))]
