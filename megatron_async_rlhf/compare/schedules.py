"""The schedules that are compared, as settings of one configuration, and which of them a run had.

- `async`: as configured, with a staleness bound above 0.
- `same_split`: synchronous on the same devices; while one side works the other idles. The paper's baseline.
- `alternating`: synchronous, and learner and generators use all devices in turn, as most trainers do.

A share of the devices each against all devices in turn is what decides whether asynchronous training pays: overlap cannot gain
more against `alternating` than the two sides lose there by not using all devices well.
"""

from typing import Any, Literal, get_args

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import shares_gpu

Schedule = Literal["async", "same_split", "alternating"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
BASELINES: tuple[Schedule, ...] = ("same_split", "alternating")


def schedule_of(config: RunConfig) -> Schedule:
    """Which of them a run of `config` has."""
    if config.schedule.staleness_bound != 0:
        return "async"
    return "alternating" if config.takes_turns else "same_split"


def settings_of(schedule: Schedule, config: RunConfig) -> dict[str, Any]:
    """What to override in `config` to get the schedule.

    Raises:
        ConfigError: its devices cannot be used that way, or it leaves asynchronous training nothing to overlap.
    """
    if schedule == "async":
        if config.schedule.max_staleness == 0:
            raise ConfigError(
                "schedule.max_staleness = 0: nothing overlaps, so there is nothing to compare; set at least 1"
            )
        return {"schedule.mode": "async"}
    if schedule == "same_split":
        if shares_gpu(config):
            raise ConfigError(
                "same_split: with weights.transport = ipc learner and generator share their GPU, so that there is no "
                "split; compare with --baseline alternating"
            )
        return {"schedule.mode": "sync"}
    if config.run.device == "cpu":
        return {"schedule.mode": "sync", "launch.cores": "shared"}
    if not shares_gpu(config):
        raise ConfigError(
            "alternating: sharing GPUs (weights.transport = ipc) is for one learner rank and one generator on one GPU; "
            "compare with --baseline same_split"
        )
    return {"schedule.mode": "sync"}
