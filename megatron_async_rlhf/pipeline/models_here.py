"""The models of a stage as its command will find them: directories, in place of runs and of names at the hub."""

from msgspec.structs import replace

from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.formats.hub_snapshot import with_local_models
from megatron_async_rlhf.launch.evaluation import with_policies
from megatron_async_rlhf.launch.recipe import Stage


def with_models_here(stage: Stage, *, weights: bool = True) -> Stage:
    """The stage with the configuration that its run's directory will have, so that the two can be compared.

    Args:
        weights: of models at the hub, also get these, and not only what describes them.
    """
    try:
        config = with_local_models(stage.config, weights=weights)
        if stage.command == "eval":
            config = with_policies(config, weights=weights)
        return replace(stage, config=config)
    except (CheckpointError, ConfigError):  # the command itself will say it
        return stage
