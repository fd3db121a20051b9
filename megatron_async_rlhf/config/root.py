"""The whole configuration of a run and the rules that cross its sections."""

from pydantic import Field, ValidationInfo, model_validator

from megatron_async_rlhf.config.algorithms import AlgorithmSection, OnlineDPOSection
from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.effects import check_effects
from megatron_async_rlhf.config.evaluation import EvaluationSection
from megatron_async_rlhf.config.learner_rules import check_device, check_parallelism
from megatron_async_rlhf.config.metrics import metric_names
from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.reward_modelling import RewardModellingSection
from megatron_async_rlhf.config.rewards import (
    BuiltinRewardSection,
    RewardEntry,
    RewardSection,
    check_reward_fits_data,
)
from megatron_async_rlhf.config.section import Section
from megatron_async_rlhf.config.sections import (
    CheckpointSection,
    GeneratorSection,
    LaunchSection,
    LearnerSection,
    ModelSection,
    RunSection,
    ScheduleSection,
    WarmStartSection,
    WeightsSection,
)
from megatron_async_rlhf.config.sft import SFTSection
from megatron_async_rlhf.config.sweep import SweepSection
from megatron_async_rlhf.config.telemetry import TelemetrySection
from megatron_async_rlhf.suggestions import did_you_mean

FOR_PLAN = "for_plan"  # in the context of a validation, if a plan will replace the layout


class RunConfig(Section):
    """Everything `async-rlhf train` needs; see each section's class for its keys."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    learner: LearnerSection = Field(default_factory=LearnerSection)
    warm_start: WarmStartSection = Field(default_factory=WarmStartSection)
    sft: SFTSection | None = None  # what `async-rlhf sft` does; without it that makes the warm start
    reward_model: RewardModellingSection | None = None  # what `async-rlhf reward-model` does
    generator: GeneratorSection = Field(default_factory=GeneratorSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    algorithm: AlgorithmSection = Field(default_factory=OnlineDPOSection)
    data: DataSection = Field(default_factory=DataSection)
    reward: RewardSection = Field(default_factory=BuiltinRewardSection)
    weights: WeightsSection = Field(default_factory=WeightsSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    telemetry: TelemetrySection = Field(default_factory=TelemetrySection)
    launch: LaunchSection = Field(default_factory=LaunchSection)
    sweep: SweepSection | None = None  # what `async-rlhf sweep` makes of this configuration; a run ignores it
    eval: EvaluationSection | None = None  # what `async-rlhf eval` measures; a run ignores it

    @property
    def gpus(self) -> int:
        """That a run on GPUs takes: with ipc learner and generator share theirs."""
        own = 0 if self.weights.transport == "ipc" else self.generator.workers
        return self.learner.world_size + own + self.reward_workers

    @property
    def takes_turns(self) -> bool:
        """Whether learner and generators have the same devices, so that one idles while the other works."""
        return self.launch.cores == "shared" or self.weights.transport == "ipc"

    @property
    def completions_per_rollout(self) -> int:
        return self.schedule.groups_per_rollout * self.algorithm.samples_per_prompt

    @property
    def _is_of_stage(self) -> bool:
        """Whether a stage before RL is described here, which has a learner alone."""
        return self.sft is not None or self.reward_model is not None

    @property
    def supervised(self) -> SFTSection:
        """What `async-rlhf sft` does."""
        return self.sft if self.sft is not None else SFTSection.of_warm_start(self.warm_start)

    @property
    def reward_modelling(self) -> RewardModellingSection:
        """What `async-rlhf reward-model` does."""
        return self.reward_model if self.reward_model is not None else RewardModellingSection()

    @property
    def rewards(self) -> list[RewardEntry]:
        """The entries of `reward`, also where it is one section and no list."""
        return self.reward if isinstance(self.reward, list) else [self.reward]

    @property
    def rewards_by_key(self) -> dict[str, RewardEntry]:
        """The same by their keys in the configuration."""
        if not isinstance(self.reward, list):
            return {"reward": self.reward}
        return {f"reward.{place}": entry for place, entry in enumerate(self.reward)}

    @property
    def reward_models(self) -> dict[str, RewardModelSection]:
        """Those of them that are models."""
        return {key: entry for key, entry in self.rewards_by_key.items() if isinstance(entry, RewardModelSection)}

    @property
    def served_reward_models(self) -> dict[str, RewardModelSection]:
        """Those whose servers the run starts."""
        return {key: section for key, section in self.reward_models.items() if section.url is None}

    @property
    def reward_workers(self) -> int:
        """Of all replicas of these."""
        return sum(section.replicas * section.tensor_parallel for section in self.served_reward_models.values())

    @property
    def data_read(self) -> DataSection:
        """`data`, with the columns that its rewards read by themselves among `reference_fields`."""
        columns = [column for reward in self.rewards for column in reward.columns]
        fields = list(dict.fromkeys([*self.data.reference_fields, *columns]))
        return self.data.model_copy(update={"reference_fields": fields})

    @model_validator(mode="after")
    def check_rewards(self) -> "RunConfig":
        # A stage without rewards needs not name one; `train` says it of the prompts themselves.
        needs_none = self._is_of_stage and self.reward == BuiltinRewardSection()
        for reward in [] if needs_none else self.rewards:
            check_reward_fits_data(reward, self.data)
        titles = [reward.title for reward in self.rewards]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(
                    f"reward: {titles.count(title)} entries are called {title}; give each a name of its own (name: ...)"
                )
        return self

    @model_validator(mode="after")
    def check_judge(self) -> "RunConfig":
        titles, judge = [reward.title for reward in self.rewards], self.eval and self.eval.judged_by
        if judge and judge not in titles:
            raise ValueError(
                f"eval.judged_by = {judge}: no entry of reward has this name; "
                f"{did_you_mean(judge, titles, otherwise=f'there are {titles}')}"
            )
        return self

    @model_validator(mode="after")
    def check_best_metric(self) -> "RunConfig":
        metric, names = self.checkpoint.keep_best, metric_names(self.algorithm, self.rewards)
        if metric is not None and metric not in names:
            raise ValueError(
                f"checkpoint.keep_best = {metric}: this run's steps have no such metric; "
                f"{did_you_mean(metric, names, otherwise='there are {names}')}"
            )
        return self

    @model_validator(mode="after")
    def check_effects(self) -> "RunConfig":
        check_effects(self)
        return self

    @model_validator(mode="after")
    def check_rollout_boundaries(self) -> "RunConfig":
        updates = self.schedule.updates_per_rollout
        every = {"checkpoint.every_steps": self.checkpoint.every_steps, "schedule.eval_every": self.schedule.eval_every}
        for key, value in every.items():
            if value is not None and value % updates:
                raise ValueError(
                    f"{key} = {value} is not a multiple of schedule.mini_batches x schedule.epochs = {updates}, the steps on "
                    "one rollout"
                )
        return self

    @model_validator(mode="after")
    def check_overlong_buffer(self) -> "RunConfig":
        buffer, longest = self.algorithm.overlong_buffer, self.generator.max_new_tokens
        if buffer is not None and buffer > longest:
            raise ValueError(
                f"algorithm.overlong_buffer = {buffer} is above generator.max_new_tokens = {longest}: every completion "
                "would be overlong"
            )
        return self

    @model_validator(mode="after")
    def check_learner(self) -> "RunConfig":
        check_parallelism(self.learner)
        check_device(self.run.device, self.learner)
        return self

    @model_validator(mode="after")
    def check_weight_transfer(self) -> "RunConfig":
        transport, device = self.weights.transport, self.run.device
        if (transport == "gloo") != (device == "cpu"):
            fitting = "gloo" if device == "cpu" else "nccl, or ipc where learner and generator share one GPU"
            raise ValueError(
                f"weights.transport = {transport} does not go with run.device = {device}: set weights.transport = {fitting}"
            )
        if self.learner.timeout_s < 2 * self.weights.timeout_s:
            raise ValueError(
                f"learner.timeout_s = {self.learner.timeout_s:g} must be at least twice weights.timeout_s = "
                f"{self.weights.timeout_s:g}, so that a push that hangs is reported by those who wait in it"
            )
        return self

    @model_validator(mode="after")
    def check_cores(self) -> "RunConfig":
        if self.launch.cores == "shared" and self.schedule.staleness_bound != 0:
            raise ValueError(
                "launch.cores = shared: learner and generators would compute on the same cores at once; set "
                "schedule.mode = sync, with which they take turns, or launch.cores = split"
            )
        return self

    @model_validator(mode="after")
    def check_gpus(self, info: ValidationInfo) -> "RunConfig":
        if self.run.device == "cpu":
            return self
        learners, workers = self.learner.world_size, self.generator.workers
        if self.weights.transport == "ipc" and (learners, workers) != (1, 1):
            raise ValueError(
                f"weights.transport = ipc is for one learner rank and one generator on the same GPU, not learner.ranks = "
                f"{learners} and generator.replicas x tensor_parallel = {workers}; set weights.transport = nccl"
            )
        # Which command it is for nobody knows yet, except for `plan`; `launch.layout` counts again.
        is_laid_out = not (self._is_of_stage or (info.context or {}).get(FOR_PLAN))
        if is_laid_out and self.gpus > self.launch.nodes * self.launch.gpus_per_node:
            rewards = self.reward_workers
            parts = f"learner.ranks = {learners} and generator.replicas x tensor_parallel = {workers}"
            if rewards:
                parts = f"{parts.replace(' and ', ', ')} and reward.replicas x tensor_parallel = {rewards}"
            raise ValueError(
                f"{parts} need {self.gpus} GPUs, above launch.nodes = {self.launch.nodes} with launch.gpus_per_node = "
                f"{self.launch.gpus_per_node}"
            )
        return self
