"""A whole push inside one process: learner ranks and generator workers as threads, real gloo between them.

Parameters are filled from, and checked against, whole Hugging Face tensors through `reshard.split` on the learner's
side and vLLM's own rules written down again on the generator's, not through the pieces the plan is made of.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from whole_tensors import split

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import Rule
from megatron_async_rlhf.models.hf_mapping import copies_of_tied_embedding, hf_shapes, model_mappings
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.types import PushReport
from megatron_async_rlhf.weights.plan import TransferPlan, plan_transfer
from megatron_async_rlhf.weights.receive import Check, Receiver
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.send import Sender
from megatron_async_rlhf.weights.transports.gloo import GlooTransport
from megatron_async_rlhf.weights.transports.rendezvous import host_store, join_store, meet
from megatron_async_rlhf.weights.transports.shared_memory import SharedMemoryTransport
from megatron_async_rlhf.weights.transports.transport import Transport

Weights = dict[str, torch.Tensor]


def random_weights(arch: Architecture, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Every bit pattern, NaNs and infinities included: what is only moved must survive unchanged."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8)
        .view(dtype)
        for name, shape in hf_shapes(arch).items()
    }  # fmt: skip


def learner_parameters(weights: Weights, arch: Architecture, layout: LearnerLayout, rank: int) -> Weights:
    tensor_rank, stage = layout.place(rank)
    stages = layout.pipeline_parallel
    placed = (*model_mappings(arch, stages), *copies_of_tied_embedding(arch, stages))
    return {
        m.megatron: split(m.rule, [weights[name] for name in m.hf], arch, layout.tensor_parallel, tensor_rank).clone()
        for m in placed
        if m.stage == stage
    }


def vllm_parameters(weights: Weights, arch: Architecture, ranks: int, rank: int) -> Weights:
    """As vLLM's loaders cut them: query, key, value one after the other, whole heads, the vocabulary padded to 64."""
    return {m.vllm: _vllm_parameter(m, weights, arch, ranks, rank) for m in model_mappings(arch, 1)}


def _vllm_parameter(mapping, weights: Weights, arch: Architecture, ranks: int, rank: int) -> torch.Tensor:
    tensors = [weights[name] for name in mapping.hf]
    match mapping.rule:
        case Rule.REPLICATED:
            return tensors[0]
        case Rule.ROW:
            return tensors[0].chunk(ranks, 1)[rank]
        case Rule.GATE_UP:
            return torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
        case Rule.VOCAB:
            missing = -tensors[0].shape[0] % 64
            padded = torch.cat([tensors[0], tensors[0].new_zeros(missing, *tensors[0].shape[1:])])
            return padded.chunk(ranks)[rank]
        case Rule.QKV:
            query, *key_value = tensors
            copies = max(1, ranks // arch.kv_heads)
            return torch.cat([query.chunk(ranks)[rank], *(t.chunk(ranks // copies)[rank // copies] for t in key_value)])


class DictTarget:
    """A worker whose parameters are a dict of tensors. `damage(parameter)` may spoil one before it is checked."""

    def __init__(self, parameters: Weights, damage: Callable[[str, torch.Tensor], None] | None = None) -> None:
        self.parameters = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.completed: list[str] = []
        self._damage = damage

    def open(self, parameter: str) -> torch.Tensor:
        return self.parameters[parameter]

    def complete(self, parameter: str, check: Check) -> None:
        self.completed.append(parameter)
        if self._damage:
            self._damage(parameter, self.parameters[parameter])
        check(self.parameters[parameter])


class TransferGroup:
    """Learner ranks and workers that have met; `push` may be called again and again.

    `shared`: they read each other's memory, as on one machine; else every byte goes over sockets.
    """

    def __init__(
        self,
        arch: Architecture,
        layout: LearnerLayout,
        *,
        tensor_parallel: int = 1,
        replicas: int = 1,
        dtype: torch.dtype = torch.float32,
        staging_bytes: int = 2**16,
        timeout_s: float = 20.0,
        shared: bool = True,
    ) -> None:
        self.arch, self.layout, self.dtype = arch, layout, dtype
        self.roster = Roster(
            senders=layout.ranks,
            generators=[f"generator.{i}" for i in range(replicas)],
            tensor_parallel=tensor_parallel,
        )
        self.plan = plan_transfer(
            arch, layout, tensor_parallel, dtype=str(dtype).removeprefix("torch."), staging_bytes=staging_bytes
        )
        self._shared, self._timeout_s = shared, timeout_s
        (self._port,) = free_ports(1)
        self._pool = ThreadPoolExecutor(self.roster.world_size)
        self._store = None
        self.transports = self.on_every_rank(self._connect)
        self._ends = self.on_every_rank(self._make_end)

    def on_every_rank(self, act: Callable[[int], object]) -> list:
        """`act(rank)` on all ranks at once; errors are results too."""

        def guarded(rank: int):
            try:
                return act(rank)
            except TransferError as error:
                return error

        futures = [self._pool.submit(guarded, rank) for rank in range(self.roster.world_size)]
        return [future.result(timeout=90) for future in futures]

    def _connect(self, rank: int) -> Transport:
        if rank == 0:
            store = self._store = host_store("127.0.0.1", self._port, self._timeout_s)
        else:
            store = join_store("127.0.0.1", self._port, self._timeout_s)
        own = meet(store, self.roster, rank, "0", self._timeout_s)
        gloo = GlooTransport(own, self.roster, rank, self._timeout_s)
        return SharedMemoryTransport(gloo, own) if self._shared else gloo

    def _make_end(self, rank: int) -> Sender | Receiver:
        transport = self.transports[rank]
        if rank < self.roster.senders:
            return Sender(self.plan, self.roster, transport)
        return Receiver(self.plan, self.roster, transport)

    def targets(self, weights: Weights, damage=None) -> dict[int, DictTarget]:
        """An empty target for every worker, by group rank; `damage(rank, parameter, tensor)`."""
        targets = {}
        for rank in range(self.roster.senders, self.roster.world_size):
            worker = self.roster.place(rank)[1]
            like = vllm_parameters(weights, self.arch, self.roster.tensor_parallel, worker)
            spoil = (lambda name, tensor, rank=rank: damage(rank, name, tensor)) if damage else None
            targets[rank] = DictTarget(like, spoil)
        return targets

    def push(
        self, weights: Weights, targets: dict[int, DictTarget], *, verify: bool = True, without: tuple[int, ...] = ()
    ) -> list[PushReport | TransferError | None]:
        """What every rank returned or raised; ranks in `without` do nothing at all."""
        parameters = {
            rank: learner_parameters(weights, self.arch, self.layout, rank) for rank in range(self.layout.ranks)
        }

        def act(rank: int):
            if rank in without:
                return None
            if rank < self.roster.senders:
                return self._ends[rank].push(parameters[rank].__getitem__, verify=verify)
            return self._ends[rank].receive(targets[rank], verify=verify)

        return self.on_every_rank(act)

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        self._pool.shutdown()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_holds(targets: dict[int, DictTarget], weights: Weights, group: TransferGroup) -> None:
    for rank, target in targets.items():
        expected = vllm_parameters(weights, group.arch, group.roster.tensor_parallel, group.roster.place(rank)[1])
        # A worker whose share of the vocabulary is all padding is sent none of it.
        assert sorted(target.completed) == sorted(name for name, tensor in expected.items() if tensor.any())
        for name, tensor in expected.items():
            assert same_bits(target.parameters[name], tensor), (rank, name)


__all__ = ["DictTarget", "TransferGroup", "TransferPlan", "assert_holds", "random_weights", "same_bits"]
