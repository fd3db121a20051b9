"""What crosses the seams between controller, learner, generators and rewards.

Everything is frozen and msgpack-serialisable (msgspec), so the same objects travel over ZeroMQ, land in
`samples.jsonl` and feed tests. One word per idea:

- *policy version*: number of optimizer steps the weights have seen since RL began; the warm-started policy is 0.
- *staleness* of a token: version being trained minus version that sampled it, in optimizer steps.
"""

from typing import Any

from msgspec import Struct


class Message(Struct, frozen=True):
    """One turn of a conversation; `role` is `system`, `user`, `assistant` or another that the chat template knows."""

    role: str
    content: str


class Prompt(Struct, frozen=True, kw_only=True):
    """One conversation up to where the assistant answers, tokenized once.

    Attributes:
        index: position in its split; with the run's seed it identifies the prompt for ever.
        text: what the user said, without the chat template; of several turns all, each after its role.
        token_ids: the templated prompt, [prompt_length].
        messages: the conversation, as the data has it; empty in recordings of earlier versions.
        reference: what the verifier needs (task kind and answer, `#### number`...).
        solution: a good answer for the supervised warm start, without the end-of-sequence token; None if unknown.
        origin: file and line, or dataset and row, for messages; empty if it was made.
    """

    index: int
    text: str
    token_ids: list[int]
    reference: dict[str, Any]
    solution: str | None = None
    origin: str = ""
    messages: list[Message] = []

    @property
    def name(self) -> str:
        """For messages: where it comes from, and how it begins."""
        return f"{self.origin or f'prompt {self.index}'} ({self.text[:40]!r})"


class Completion(Struct, frozen=True, kw_only=True):
    """What a generator sampled for one prompt.

    Attributes:
        token_ids: sampled tokens including the one that ended it, if any did, [length]; may be empty.
        logprobs: the sampler's log-probability of each token at the sampling temperature, [length].
        versions: policy version that sampled each token, [length].
        finished: True if a token that ends a completion was sampled (the tokenizer's or another of the model's), False
            if the length limit cut it off.
        text: decoded without special tokens, and without the token that ended it.
        interrupted: True if the generator was told to stop before either: there is more to sample.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finished: bool
    text: str
    interrupted: bool = False


class RolloutGroup(Struct, frozen=True, kw_only=True):
    """All completions of one prompt with their rewards, [samples_per_prompt] each."""

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]


class Sequence(Struct, frozen=True, kw_only=True):
    """A prompt followed by a completion, as the learner sees it.

    Attributes:
        token_ids: prompt then completion, [prompt_length + completion_length].
        prompt_length: number of leading tokens the loss ignores.
        ignored: further tokens that it ignores, from a first to before a last: what others say between two answers.
    """

    token_ids: list[int]
    prompt_length: int
    ignored: list[tuple[int, int]] = []

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is of."""
        return len(self.token_ids) - self.prompt_length - sum(end - start for start, end in self.ignored)


class TokenizedPair(Struct, frozen=True, kw_only=True):
    """A prompt with a better and a worse completion, as the learner sees them.

    Attributes:
        chosen, rejected: prompt and completion, all that the chat template writes, [length] each.
        margin: by how much the reward of the chosen one is to be the higher one.
    """

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0


class TrainingGroup(Struct, frozen=True, kw_only=True):
    """The samples of one prompt that are trained on, as the learner sees them, [samples] each.

    Attributes:
        sequences: prompt and completion; of online DPO chosen, then rejected; of Best-of-N the best.
        rewards: of each sample, as shaped by the algorithm's keys.
        sampler_logprobs: the sampler's log-probability of each completion token.
    """

    sequences: list[Sequence]
    rewards: list[float]
    sampler_logprobs: list[list[float]]


class StepMetrics(Struct, frozen=True, kw_only=True):
    """What one optimizer step reports: scalars by name, each already reduced over the whole batch."""

    values: dict[str, float]


class Span(Struct, frozen=True, kw_only=True):
    """A stretch of work on one process for the timeline; `start` and `end` are Unix seconds.

    Attributes:
        lane: what of the process did it, where several things happen at once: spans of one lane follow each other or nest.
        args: what it was about: `version`, `samples`, `tokens`, `bytes` and the like.
    """

    name: str
    start: float
    end: float
    process: str = ""
    lane: str = ""
    args: dict[str, int | float] = {}


class PushReport(Struct, frozen=True, kw_only=True):
    """What a weight push moved and proved; the same on every rank that took part.

    Attributes:
        wire_bytes: bytes of weights that arrived at generator workers, all together.
        generators: how many took part.
        compared: digests compared, one per slice and worker; 0 when not verified.
        mismatches: `generator rank: tensor[rows, columns] from learner rank` of every slice that differs.
    """

    wire_bytes: int
    generators: int = 1
    compared: int = 0
    mismatches: list[str] = []
