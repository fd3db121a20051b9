"""What supervised fine-tuning reads that is not in its directory, remembered there: which rows a step is of follows from it."""

import msgspec
from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.jobs.supervised_inputs import SupervisedInputs
from megatron_async_rlhf.launch.input_digests import digest_rows, digest_weights
from megatron_async_rlhf.telemetry.files import INPUTS


class SupervisedDigests(Struct, frozen=True, kw_only=True):
    """Of the rows as the learner sees them, in their order.

    Attributes:
        weights: of `model.hf`; None without it.
    """

    train: str
    held_out: str
    weights: str | None = None


def digest_supervised(config: RunConfig, inputs: SupervisedInputs) -> SupervisedDigests:
    """
    Raises:
        ConfigError: the weights of `model.hf` cannot be read.
    """
    return SupervisedDigests(
        train=digest_rows(inputs.train.rows),
        held_out=digest_rows(inputs.held_out),
        weights=None if config.model.hf is None else digest_weights(config.model.hf),
    )


def check_same_rows(config: RunConfig, now: SupervisedDigests) -> None:
    """That a stage continues with what it began with; a stage of an earlier version has not noted that.

    Raises:
        ConfigError: its rows are others.
    """
    path = config.run.path / INPUTS
    try:
        before = msgspec.json.decode(path.read_bytes(), type=SupervisedDigests)
    except FileNotFoundError:
        return
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); delete it to continue without comparing the data"
        ) from None
    rows = "conversations, or the template that renders them,"
    for read, what, was, found in (
        (f"data.train = {config.data.train}", rows, before.train, now.train),
        (f"data.eval = {config.data.eval}", rows, before.held_out, now.held_out),
        (f"model.hf = {config.model.hf}", "weights", before.weights, now.weights),
    ):
        if was != found:
            raise ConfigError(
                f"{read}: its {what} are not those that {config.run.path} was started with; put back what was there, or start "
                "again without --resume"
            )
