"""Where a controller process finds the others of its run."""

from collections.abc import Sequence

from msgspec import Struct


class Addresses(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        learner: ZeroMQ address of learner rank 0; empty for a job that has none.
        generators: URLs; empty for a job that has none.
        rewards: URLs of the servers of reward models that the run has started, in the order of the configuration.
        transfer: host and port on which learner rank 0 meets the generators; None without generators.
    """

    learner: str
    generators: list[str] = []
    rewards: list[str] = []
    transfer: tuple[str, int] | None = None

    @classmethod
    def of(
        cls, learner: str | None, generators: Sequence[str], transfer: str | None, rewards: Sequence[str] = ()
    ) -> "Addresses":
        """As they stand on a command line."""
        host, _, port = (transfer or "").rpartition(":")
        return cls(
            learner=learner or "",
            generators=list(generators),
            rewards=list(rewards),
            transfer=(host, int(port)) if transfer else None,
        )
