"""The nouns of the project and the protocols between its parts. Needs neither numpy nor torch until a sample is made.

Shape letters   T packed tokens of a micro-batch | S sequences in it | P spans | L predictions of one sample
Alignment       inputs = tokens[:-1], labels = tokens[1:]. A stream x describes predictions:
                x[t] belongs to labels[t]. Only pack() cuts; nobody shifts anything afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.config import Config
from rlhf.lazy import np

if TYPE_CHECKING:
    from torch import Tensor

ABSENT: Any = None  # what nobody has written yet
AllSum = Callable[["Tensor"], "Tensor"]  # autograd-aware sum over some process group; the identity on one rank
Sums = dict[str, tuple[float, float]]  # metric -> (sum, count)


@dataclass(frozen=True, slots=True)
class Text:
    """A sample in words, with the line of the data set that it comes from."""

    row: int = -1  # place of the line among the lines of all files
    record: Mapping[str, Any] = field(default_factory=dict)  # the line, for reward functions
    prompt: str = ""
    response: str = ""  # empty until a response is sampled; of several turns, all of them
    turns: Sequence[Mapping[str, str]] = ()  # of a response that an environment has answered: role and content


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a sampled response was judged to be worth, and by whom. Sample.reward is the sum."""

    rule: float = 0.0  # by the reward function
    score: float | None = None  # by the reward model; None where there is none
    failed: bool = False  # the function failed on it, and its rule counts as 0


@dataclass(slots=True)
class Sample:
    """One prompt with one response (a bare prompt is a sample whose mask is all False).

    A group is everything one prompt produced; a preference pair is a group of two.
    """

    tokens: np.ndarray  # [L+1] int32, prompt then response
    mask: np.ndarray  # [L] bool, True where labels[t] is a response token to learn
    group: int  # siblings share it; unique within a step
    reward: float = 0.0  # the response's worth; offline: its given score, or 1.0 chosen and 0.0 rejected
    truncated: bool = False  # the length limit stopped it, not the model
    text: Text = field(default_factory=Text)
    verdict: Verdict = field(default_factory=Verdict)

    version: np.ndarray = ABSENT  # [L] int32, steps after which the weights that sampled labels[t] were published; -1: not sampled
    sampler_logp: np.ndarray = ABSENT  # [L] float32, the engine's own log-probs
    old_logp: np.ndarray = ABSENT  # [L] float32, policy before this update
    ref_logp: np.ndarray = ABSENT  # [L] float32, frozen reference
    values: np.ndarray = ABSENT  # [L] float32, critic before this update
    advantages: np.ndarray = ABSENT  # [L] float32, written by Algorithm.credit
    returns: np.ndarray = ABSENT  # [L] float32, written by Algorithm.credit


def groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples by group, in order of first appearance."""
    members: dict[int, list[Sample]] = {}
    for sample in samples:
        members.setdefault(sample.group, []).append(sample)
    return list(members.values())


def worth(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rewards [S] float32. Wherever rewards are compared, they are compared in this precision: 0.1 + 0.2 and 0.3 are equal."""
    return np.array(rewards, np.float32)


def differ(rewards: Sequence[float] | np.ndarray) -> bool:
    """Whether a group's rewards tell its responses apart."""
    return bool(np.ptp(worth(rewards)) > 0)


def scored(sample: Sample) -> Sample:
    """The sample with one more place, the last, whose value is the reward model's score of the whole text.

    A scalar head must see the final token, and inputs are tokens[:-1]: so the last token is repeated, as a label that nobody learns.
    """
    tokens, mask = np.append(sample.tokens, sample.tokens[-1]), np.append(sample.mask, True)
    return replace(sample, tokens=tokens, mask=mask, **dict.fromkeys(STREAMS, ABSENT))


STREAMS = ("sampler_logp", "old_logp", "ref_logp", "values", "advantages", "returns")


@dataclass(slots=True)
class Spans:
    """Which queries of a packed row attend to which keys, causally.

    Span i takes q_lengths[i] queries from q_starts[i] on in this rank's slice, and k_lengths[i] keys from k_starts[i] on in the whole
    row. Its last query sees its last key (bottom-right alignment). Without CP a span is a sequence; with CP, a sequence's part in a chunk.
    """

    q_starts: list[int]  # [P]
    q_lengths: list[int]  # [P]
    k_starts: list[int]  # [P]
    k_lengths: list[int]  # [P], k_lengths[i] >= q_lengths[i]


@dataclass(slots=True)
class Batch:
    """One packed micro-batch as one rank sees it (under CP: its slice of T)."""

    inputs: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    positions: Tensor  # [T] int64, within the token's own sequence
    places: Tensor  # [T] int64, of the token in the whole row
    spans: Spans
    mask: Tensor  # [T] float32, 1.0 where labels[t] is learned
    last: Tensor  # [T] float32, 1.0 at each sequence's final learned token
    segment: Tensor  # [T] int64, which of the S sequences (padding: S)
    group: Tensor  # [S] int64
    reward: Tensor  # [S] float32
    pairs: Tensor  # [2, pairs] int64, the better and the worse response of each ordered pair of one group, by reward; ties make none
    streams: dict[str, Tensor]  # name in STREAMS -> [T] float32
    cp_sum: AllSum = lambda x: x  # over the CP ranks

    def seq_sum(self, x: Tensor) -> Tensor:
        """Sum x[T] over each sequence's learned tokens -> [S], whole sequences even under CP."""
        return self.cp_sum(self._by_sequence(x * self.mask))

    def owned(self) -> Tensor:
        """1.0 where this rank holds the sequence's last learned token [S].

        Under CP every rank knows all of a seq_sum, and totals and counts are summed over the ranks: so what belongs to a whole sequence
        is counted by its owner alone.
        """
        return self._by_sequence(self.last)

    def _by_sequence(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.group) + 1).index_add(0, self.segment, x)[:-1]

    def at_last(self, x: Tensor) -> Tensor:
        """x[T] at each sequence's last learned token -> [S]; only one CP rank holds it."""
        return self.seq_sum(x * self.last)


@dataclass(slots=True)
class Output:
    """What a model says about a Batch. Algorithms never see logits."""

    logp: Tensor = ABSENT  # [T] float32, log p(labels[t]) at the rollout's temperature
    entropy: Tensor = ABSENT  # [T] float32, of the same distribution
    value: Tensor = ABSENT  # [T] float32, scalar head (critic, reward model) at inputs[t]: what it says before labels[t] is known


@dataclass(slots=True)
class Loss:
    """A sum and a count: the learner divides by the global count, so splits cannot matter."""

    total: Tensor  # [] summed over this rank's units
    count: Tensor  # [] number of units: tokens, sequences or pairs
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum, count)


Form = Literal["demonstrations", "scored", "pairs", "prompts"]  # of the lines of a data set (rlhf.data.forms)


class Algorithm:
    """A mode: what it is called, what it needs, and what it adds to the shared loop.

    The class says what is true of every run of the mode, an instance what depends on the configuration. Whatever the rest of the package
    asks of a mode, it asks here. credit() and loss() are pure tensor code: no process groups, engines or files.
    """

    summary: ClassVar[str]  # its line in --help
    form: ClassVar[Form]  # of the lines that it reads
    aliases: ClassVar[tuple[str, ...]] = ()  # other names on the command line
    section: ClassVar[tuple[str, type] | None] = None  # of the configuration: name, and dataclass of its keys; two modes may share one
    trains: ClassVar[bool] = True  # some model learns; data.train is read. Without, data.eval is
    online: ClassVar[bool] = False  # samples come from an engine, not from the data set
    whole_groups: ClassVar[bool] = False  # a group must share one micro-batch (pairwise losses)
    weighs: ClassVar[bool] = False  # its loss corrects for tokens that other weights than the policy's have drawn (rollout.inflight)
    aligns: ClassVar[bool] = True  # starts from a fine-tuned model, unlike the stages before it
    rule: ClassVar[str] = ""  # reward function that it is usually run with; empty: a reward model

    models: Mapping[str, Literal["train", "frozen"]] = {}  # by role; the first trained one is what the run is for
    with_lm: tuple[str, ...] = ()  # roles with a scalar head that need their output layer too
    streams: tuple[str, ...] = ()  # scored before credit(): "old_logp", "ref_logp", "values"
    warmup: Mapping[str, int] = {}  # role -> steps before its first update
    state: dict[str, float]  # what credit() carries from step to step; checkpoints keep it

    def __init__(self, config: Config):
        """Raises UserError where keys contradict each other."""
        self.state = {}

    def credit(self, samples: list[Sample]) -> tuple[list[Sample], Sums]:
        """Turn rewards into advantages (or pairs), with metrics. Sees all samples of the step, identical on every rank."""
        return samples, {}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        """What `role` minimises on one micro-batch."""
        raise NotImplementedError


@dataclass(slots=True, frozen=True)
class Sampling:
    """How an engine draws tokens. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()  # generation ends after one of these; it stays in the tokens


@dataclass(slots=True)
class Completion:
    """What an engine made of one prompt."""

    tokens: list[int]  # the response, including the stop token that ended it
    logp: list[float]  # log-prob of each token at the sampling temperature
    finish: str  # "stop" (a stop token was drawn) | "length" (cut by a limit) | "held" (withdrawn before its end)


@dataclass(slots=True)
class Request:
    """A prompt for an engine to continue."""

    key: int  # the caller's name for it, unique among those that the engine holds
    prompt: list[int]
    sampling: Sampling
    seed: int  # it alone decides the random draws; 0 <= seed < 2**63
    ends: Callable[[list[int]], bool] | None = None  # asked after every token of the response: whether it is complete (a stop string)


class Engine(ABC):
    """Generates with whatever stands in its live parameters, which publish() writes box by box.

    It works in steps, so that a response can be used as soon as it is complete. All ranks of an engine make the same calls.
    """

    @abstractmethod
    def submit(self, requests: list[Request]) -> None:
        """Take up requests, behind those that are waiting. A prompt must not be empty, and leave room for a token."""

    @abstractmethod
    def advance(self) -> list[tuple[int, Completion]]:
        """Draw a token for as many requests as run at a time; those that this has completed, by their keys."""

    @abstractmethod
    def withdraw(self) -> list[tuple[int, Completion]]:
        """Forget all requests that are held. What was drawn for each, which may be nothing, by their keys; they finish as "held"."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """This rank's shards by the engine's own names; valid between wake_weights() and sleep()."""

    @abstractmethod
    def sleep(self) -> None:
        """Give the device memory back; weights and KV cache are lost. No request is held by then."""

    @abstractmethod
    def wake_weights(self) -> None:
        """Make parameters() writable again (their content is undefined until the next publish)."""

    @abstractmethod
    def wake(self) -> None:
        """Ready to generate with the parameters as they stand now; whatever was cached of older weights is dropped."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Completion]:
        """One completion per prompt, in order, of an engine that holds no other requests."""
        assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
        self.submit([Request(i, prompt, sampling, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))])
        found: dict[int, Completion] = {}
        while len(found) < len(prompts):
            found.update(self.advance())
        return [found[i] for i in range(len(prompts))]
