"""What must be true of every schedule, checked from outside: from what generators stamped and the learner was given.

Nothing here asks the scheduler what it believes. A prompt's first token is the number of its group, a completion's
tokens are the number of its sample; which weights sampled what is known from the generators, which groups were trained
and at which version from the learner's commands.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import InvariantError
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.learner.protocol import Learner, TrainRollout
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.state import ReadyGroup
from megatron_async_rlhf.telemetry.summary import RunTotals
from megatron_async_rlhf.types import Completion

HELD_OUT = 1 << 40  # prompts from here on are for evaluation


class SampleRecord(Struct):
    """What is known about one completion, by the generators' word.

    Attributes:
        group: which prompt it is of.
        drawn: how long it wanted to be; `length` is what the limit leaves of it.
        versions: (version, how many tokens) in order.
    """

    group: int
    drawn: int
    length: int
    versions: list[tuple[int, int]] = []


class Ledger:
    """Of one simulated run, over all its controllers.

    Attributes:
        samples: by number.
        ages: tokens of all samples trained on, by staleness.
        trained: groups the learner has had.
    """

    def __init__(self, config: RunConfig) -> None:
        schedule = config.schedule
        self._schedule, self._bound = schedule, schedule.staleness_bound
        most = schedule.max_groups
        if self._bound is not None:
            allowed = (self._bound // schedule.updates_per_rollout + 1) * schedule.groups_per_rollout
            most = min(allowed, most or allowed)
        assert most is not None  # the configuration bounds one or the other
        self._most = most
        self._samples_per_group = config.algorithm.samples_per_prompt
        self.samples: list[SampleRecord] = []
        self.ages: Counter[int] = Counter()
        self.trained: set[int] = set()
        self._outstanding: set[int] = set()
        self._rollout: set[int] = set()  # groups the learner is told of next

    # From the generators.

    def asked(self, request: SamplingRequest) -> None:
        group = request.prompt.token_ids[0]
        if group >= HELD_OUT:
            return
        if group in self.trained:
            raise InvariantError(f"group {group} is sampled, but the learner has had it")
        self._outstanding.add(group)
        if len(self._outstanding) > self._most:
            raise InvariantError(f"{len(self._outstanding)} groups are outstanding, above {self._most}")

    def new_sample(self, request: SamplingRequest, drawn: int) -> int:
        """Its number."""
        record = SampleRecord(group=request.prompt.token_ids[0], drawn=drawn, length=min(drawn, request.max_new_tokens))
        self.samples.append(record)
        return len(self.samples) - 1

    def stamped(self, sample: int, versions: list[int]) -> None:
        """Which weights sampled each of its tokens."""
        record = self.samples[sample]
        runs = [(version, len(list(same))) for version, same in groupby(versions)]
        if runs != sorted(runs):
            raise InvariantError(f"versions decrease within sample {sample} of group {record.group}: {runs}")
        if len(runs) > 1 and self._schedule.in_flight_updates == "none":
            raise InvariantError(f"sample {sample} of group {record.group} met versions {runs}")
        if runs and runs[0][0] < 0:
            raise InvariantError(f"sample {sample} of group {record.group} was sampled without weights")
        record.versions = runs

    def check_empty_before_weights(self, generator: str, is_idle: bool) -> None:
        if self._schedule.in_flight_updates == "none" and not is_idle:
            raise InvariantError(f"{generator} receives weights in the midst of its work")

    # From the learner.

    def write(self, command: TrainRollout, rollout: Sequence[ReadyGroup], arrived: list[int]) -> None:
        """As a `RolloutSink`: all groups of the rollout, also those that teach nothing."""
        schedule, groups = self._schedule, [group.scored.group for group in rollout]
        if len(groups) != schedule.groups_per_rollout or command.epochs != schedule.epochs:
            raise InvariantError(
                f"version {command.version} is trained on {len(groups)} groups, {command.epochs} times"
            )
        self._rollout = {group.prompt.token_ids[0] for group in groups}
        if len(self._rollout) < len(groups) or not self._rollout <= self._outstanding:
            raise InvariantError(
                f"version {command.version} is trained on groups {sorted(self._rollout)}, outstanding are "
                f"{sorted(self._outstanding)}"
            )
        self._outstanding -= self._rollout
        self.trained |= self._rollout
        size = schedule.prompts_per_step
        for update in range(schedule.updates_per_rollout):
            place = update % schedule.mini_batches * size
            for group in groups[place : place + size]:
                for completion in group.completions:
                    self._check_ages(completion.token_ids[0], command.version, update)

    def train(self, command: TrainRollout, version: int) -> None:
        """A rollout begins, at the learner's `version`."""
        if command.version != version:
            raise InvariantError(f"the learner is at version {version}, the command for version {command.version}")
        sequences = [s for batch in command.mini_batches for group in batch for s in group.sequences]
        for sequence in sequences:
            record = self.samples[sequence.token_ids[sequence.prompt_length]]
            if record.group != sequence.token_ids[0] or record.group not in self._rollout:
                raise InvariantError(f"version {version} is trained on a sample of group {record.group} by mistake")
        self._rollout = set()

    def _check_ages(self, sample: int, version: int, update: int) -> None:
        record = self.samples[sample]
        for sampled_by, tokens in record.versions:
            self.ages[version + update - sampled_by] += tokens
            too_old = self._bound is not None and version - sampled_by > self._bound
            if too_old or sampled_by > version:
                raise InvariantError(
                    f"group {record.group} has tokens of version {sampled_by}, and is trained from version {version} on"
                )
        if sum(tokens for _, tokens in record.versions) != record.length:
            raise InvariantError(f"sample {sample} of group {record.group} is trained before it is whole")

    # At the end.

    def check_end(self, totals: RunTotals) -> None:
        """After the last step."""
        schedule = self._schedule
        groups = schedule.rollouts * schedule.groups_per_rollout
        if totals.staleness != self.ages:
            raise InvariantError(f"staleness is told as {dict(totals.staleness)}, but was {dict(self.ages)}")
        if self.trained != set(range(groups)) or self._outstanding:
            raise InvariantError(f"{len(self.trained)} of {groups} groups were trained, {len(self._outstanding)} left")
        if totals.samples_generated != totals.samples_trained + totals.samples_not_selected + totals.samples_cancelled:
            raise InvariantError(
                f"{totals.samples_generated} samples were generated, but {totals.samples_trained} trained, "
                f"{totals.samples_not_selected} not selected and {totals.samples_cancelled} cancelled"
            )
        if totals.samples_trained + totals.samples_not_selected != groups * self._samples_per_group:
            raise InvariantError(f"{totals.samples_trained + totals.samples_not_selected} samples of {groups} groups")


class CheckedEvaluation(Evaluation):
    """Held-out prompts that are answered by one version, or not scored."""

    ledger: Ledger

    async def finish(
        self,
        when: str,
        completions: Sequence[list[Completion]],
        start: float,
        *,
        version: int,
        learner: Learner | None = None,
    ) -> None:
        records = [self.ledger.samples[completion.token_ids[0]] for (completion,) in completions]
        versions = {version for record in records for version, _ in record.versions}
        if len(versions) != 1:
            raise InvariantError(f"the evaluation at {when} met versions {sorted(versions)}")
        await super().finish(when, completions, start, version=version, learner=learner)
