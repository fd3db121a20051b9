"""Who takes part in weight pushes, and as which rank: learner ranks first, then every generator's workers."""

from msgspec import Struct


class Roster(Struct, frozen=True, kw_only=True):
    """The members of a transfer group.

    Attributes:
        senders: number of learner ranks.
        generators: names of the replicas, in the order weights travel along them.
        tensor_parallel: workers of each replica.
    """

    senders: int
    generators: list[str]
    tensor_parallel: int

    @property
    def world_size(self) -> int:
        return self.senders + len(self.generators) * self.tensor_parallel

    def worker_rank(self, replica: int, worker: int) -> int:
        """Group rank of a generator's worker."""
        return self.senders + replica * self.tensor_parallel + worker

    def place(self, rank: int) -> tuple[int, int]:
        """Replica and worker of a group rank that is not the learner's."""
        return divmod(rank - self.senders, self.tensor_parallel)

    def name(self, rank: int) -> str:
        """How messages call a rank."""
        if rank < self.senders:
            return f"learner rank {rank}"
        replica, worker = self.place(rank)
        return f"{self.generators[replica]} rank {worker}"
