"""The whole configuration of a run and the rules that cross its sections."""

from pydantic import Field, model_validator

from megatron_async_rlhf.config.sections import (
    AlgorithmSection,
    DataSection,
    GeneratorSection,
    LaunchSection,
    LearnerSection,
    ModelSection,
    RewardSection,
    RunSection,
    ScheduleSection,
    Section,
    TelemetrySection,
    WarmStartSection,
    WeightsSection,
)


class RunConfig(Section):
    """Everything `async-rlhf train` needs; see each section's class for its keys."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    learner: LearnerSection = Field(default_factory=LearnerSection)
    warm_start: WarmStartSection = Field(default_factory=WarmStartSection)
    generator: GeneratorSection = Field(default_factory=GeneratorSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    data: DataSection = Field(default_factory=DataSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    weights: WeightsSection = Field(default_factory=WeightsSection)
    telemetry: TelemetrySection = Field(default_factory=TelemetrySection)
    launch: LaunchSection = Field(default_factory=LaunchSection)

    @model_validator(mode="after")
    def check_reward_fits_data(self) -> "RunConfig":
        if self.reward.type == "builtin" and self.data.train != "builtin":
            raise ValueError("reward.type = builtin only scores data.train = builtin; set reward.type = gsm8k")
        if self.reward.type == "gsm8k" and (self.data.train == "builtin" or self.data.solution_field is None):
            raise ValueError(
                "reward.type = gsm8k needs data.train with data.solution_field, answers ending `#### <number>`"
            )
        return self

    @model_validator(mode="after")
    def check_ranks(self) -> "RunConfig":
        learner = self.learner
        model_ranks = learner.tensor_parallel * learner.pipeline_parallel
        if learner.world_size % model_ranks:
            raise ValueError(
                f"learner.ranks = {learner.world_size} is not a multiple of tensor_parallel x pipeline_parallel = "
                f"{learner.tensor_parallel} x {learner.pipeline_parallel} = {model_ranks}"
            )
        return self

    @model_validator(mode="after")
    def check_sequence_parallel(self) -> "RunConfig":
        if self.learner.sequence_parallel and self.learner.tensor_parallel == 1:
            raise ValueError(
                "learner.sequence_parallel divides tokens over the tensor-parallel ranks: learner.tensor_parallel = 1 "
                "must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def check_distributed_optimizer(self) -> "RunConfig":
        learner = self.learner
        if learner.distributed_optimizer and learner.data_parallel == 1:
            raise ValueError(
                f"learner.distributed_optimizer divides Adam's state over data-parallel ranks: learner.ranks = "
                f"{learner.world_size} / (tensor_parallel x pipeline_parallel = {learner.tensor_parallel} x "
                f"{learner.pipeline_parallel}) = 1 must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def check_weight_transfer(self) -> "RunConfig":
        if self.weights.transport != "gloo":
            raise ValueError(
                f"weights.transport = {self.weights.transport} needs learner and generators on GPUs; the learner runs "
                "on CPUs: set weights.transport = gloo"
            )
        if self.learner.timeout_s < 2 * self.weights.timeout_s:
            raise ValueError(
                f"learner.timeout_s = {self.learner.timeout_s:g} must be at least twice weights.timeout_s = "
                f"{self.weights.timeout_s:g}, so that a push that hangs is reported by those who wait in it"
            )
        return self
