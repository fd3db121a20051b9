"""What a simulation assumes about machines and models. All times are seconds."""

from typing import Literal

from msgspec import Struct

from megatron_async_rlhf.simulate.lengths import ConstantLength, Lengths


class Speeds(Struct, frozen=True, kw_only=True):
    """How long things take.

    A generator with `n` sequences decodes a token of each in `token_s + n x sequence_s`: weights are read once for all,
    the rest is work for each.

    Attributes:
        prompt_token_s: an engine takes for each token of a prompt, and of a cache that is made again.
        train_s: of one optimizer step, whatever is in it.
        train_token_s: of one optimizer step, for each token of prompts and completions in it.
        push_s: from the pause of the engines to verified weights.
        answer_s: most that a request or an answer is on its way; uniform from 0, so that they overtake each other.
        contention: how many times as long either side takes while the other works too (`prediction.slowed`).
        jitter: standard deviation of a rollout's time in the learner, as a share of it: whoever waits for the slower of
            two waits longer than for the slower one's average.
    """

    token_s: float = 0.02
    sequence_s: float = 0.0004
    prompt_token_s: float = 0.00001
    train_s: float = 0.5
    train_token_s: float = 0.0001
    push_s: float = 1.0
    answer_s: float = 0.0
    contention: float = 1.0
    jitter: float = 0.0


class Fault(Struct, frozen=True, kw_only=True):
    """What happens to one generator, once.

    Attributes:
        at: when.
        kind: `crash`: its process ends. `hang`: its process stays, but answers nobody. `silent_engine`: its HTTP front
            takes requests and says that all is well, but the engine does nothing. `cut_off`: its process ends, and the
            one that is started in its place answers, but cannot meet the learner.
        back_s: how long it takes until another process, without weights, is up in the place of one that has ended; one
            that has not is first killed, when the controller reports it.
    """

    generator: int
    at: float
    back_s: float
    kind: Literal["crash", "hang", "silent_engine", "cut_off"] = "crash"


class Scenario(Struct, frozen=True, kw_only=True):
    """A cluster that a run is simulated on.

    Attributes:
        places: most sequences that a generator's cache holds; None: no fewer than `generator.max_concurrent`.
        slowness: of each generator, how often the usual time it takes; those that are not named: 1.
        faults: that are known beforehand.
        crashes_per_hour: of each generator, besides; they are back after `back_s` on average.
        prompt_tokens: of every prompt; `shared_prompt_tokens` of them are taken in once for all samples of the prompt.
    """

    generators: int = 1
    places: int | None = None
    lengths: Lengths = ConstantLength(128)
    speeds: Speeds = Speeds()
    slowness: dict[int, float] = {}
    faults: list[Fault] = []
    crashes_per_hour: float = 0.0
    back_s: float = 60.0
    prompt_tokens: int = 32
    shared_prompt_tokens: int = 0
    seed: int = 0
