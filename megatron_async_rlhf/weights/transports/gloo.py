"""A gloo process group of its own between learner rank 0 and all generator workers.

It never touches `torch.distributed`'s default group, so a learner and a vLLM worker, each with their own, can both
hold one. Rank 0 is the learner and hosts the rendezvous store.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError


class GlooGroup:
    """Broadcasts and point-to-point messages with a timeout on each.

    Raises:
        TransferError: from every method, naming the operation, this rank and the peer.
    """

    def __init__(self, *, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False)
            prefixed = dist.PrefixStore("weight-transfer", store)
            self._group = dist.ProcessGroupGloo(prefixed, rank, world_size, timeout)
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(
                f"rendezvous of {world_size} ranks at {host}:{port} failed on rank {rank} within {timeout_s:g} s: "
                f"{_first_line(error)}"
            ) from error

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """From rank 0 to everyone, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(lambda: self._group.broadcast([tensor], options), f"broadcast of {what}")

    def send(self, tensor: torch.Tensor, peer: int, what: str) -> None:
        self._wait(lambda: self._group.send([tensor], peer, 0), f"send of {what} to rank {peer}")

    def receive(self, tensor: torch.Tensor, peer: int, what: str) -> None:
        self._wait(lambda: self._group.recv([tensor], peer, 0), f"receive of {what} from rank {peer}")

    def _wait(self, start, action: str) -> None:
        try:
            start().wait()
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(f"{action} failed on rank {self.rank}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
