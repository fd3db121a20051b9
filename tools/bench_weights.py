"""A weight push shard to shard, against gathering on rank 0 and broadcasting full tensors, in one run.

    .venv/bin/python tools/bench_weights.py --learner 2 2 1 --generator 2

Both ways move the same random weights of a Llama-shaped model between the same processes over gloo, turn by turn, into
parameters cut as vLLM's workers hold them. `broadcast` is how vLLM's own trainer client works: each tensor is gathered
whole on learner rank 0, packed into buckets, broadcast to every worker, which keeps its part. Neither way is verified,
and neither repacks; the third row is the first way with digests compared on both sides. Medians; memory is the
largest growth of any learner rank's and any worker's resident set over its own parameters.

On GPUs (`--transport ipc` with all processes on one, `--transport nccl` with one each) only the first way is measured,
and memory is what the process allocated on its GPU.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.hf_mapping import PlacedMapping, elements_held, hf_shapes, model_mappings
from megatron_async_rlhf.models.layout import (
    LearnerLayout,
    Piece,
    generator_pieces,
    learner_pieces,
    matrix_shape,
    parameter_shapes,
)
from megatron_async_rlhf.weights.plan import plan_transfer
from megatron_async_rlhf.weights.receive import Check, Receiver
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.send import Sender
from megatron_async_rlhf.weights.transports.open import open_transport
from megatron_async_rlhf.weights.transports.rendezvous import host_store, join_store

HOST, TIMEOUT_S = "127.0.0.1", 300.0
WAYS = ("shards", "broadcast", "shards, verified")


class Member:
    """One process of one way: a learner rank or a worker, its parameters, and how it pushes or receives."""

    def __init__(self, options: argparse.Namespace, port: int, rank: int) -> None:
        torch.set_num_threads(1)
        self.arch, self.layout, self.roster = architecture(options), layout(options), roster(options)
        self.rank = rank
        is_learner = rank < self.roster.senders
        if is_learner:
            pieces = learner_pieces(self.arch, self.layout, rank)
        else:
            pieces = generator_pieces(self.arch, options.generator, self.roster.place(rank)[1])
        self.device = device(options, rank)
        self.dtype = getattr(torch, options.dtype)
        torch.manual_seed(rank)
        self.parameters = {
            name: torch.randn(shape, dtype=self.dtype, device=self.device)
            for name, shape in parameter_shapes(pieces).items()
        }
        self.memory_before = self._memory("VmRSS")
        self.store = (host_store if rank == 0 else join_store)(HOST, port, TIMEOUT_S)
        self.transport = open_transport(
            options.transport,
            self.store,
            self.roster,
            rank,
            session="bench",
            timeout_s=TIMEOUT_S,
            device=self.device,
        )
        self.staging_bytes = options.staging_mib * 2**20

    def forget_peak(self) -> None:
        """Of what came before; the file is not there for every kernel and container, and GPUs do not need it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        return self._memory("VmHWM") - self.memory_before

    def _memory(self, key: str) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
        return resident_bytes(key)


class Shards(Member):
    """This project's way."""

    def __init__(self, options: argparse.Namespace, port: int, rank: int) -> None:
        super().__init__(options, port, rank)
        self.plan = plan_transfer(
            self.arch, self.layout, options.generator, dtype=options.dtype, staging_bytes=self.staging_bytes
        )
        make = Sender if rank < self.roster.senders else Receiver
        self.end = make(self.plan, self.roster, self.transport)

    def push(self, verify: bool) -> int:
        if self.rank < self.roster.senders:
            return self.end.push(self.parameters.__getitem__, verify=verify).wire_bytes
        return self.end.receive(self, verify=verify).wire_bytes

    def open(self, parameter: str) -> torch.Tensor:
        return self.parameters[parameter]

    def complete(self, parameter: str, check: Check) -> None:
        check(self.parameters[parameter])


class Broadcast(Member):
    """Whole tensors on learner rank 0, buckets to everyone."""

    def __init__(self, options: argparse.Namespace, port: int, rank: int) -> None:
        super().__init__(options, port, rank)
        self.shapes = hf_shapes(self.arch)
        self.learner = self._group("learner", rank, self.roster.senders) if rank < self.roster.senders else None
        receivers = self.roster.world_size - self.roster.senders
        member = 0 if rank == 0 else rank - self.roster.senders + 1
        self.pool = (
            self._group("pool", member, receivers + 1)
            if member >= 0 and (rank == 0 or rank >= self.roster.senders)
            else None
        )

    def _group(self, name: str, rank: int, size: int) -> dist.ProcessGroupGloo:
        return dist.ProcessGroupGloo(dist.PrefixStore(name, self.store), rank, size, timedelta(seconds=TIMEOUT_S))

    def push(self, verify: bool) -> int:
        if self.rank >= self.roster.senders:
            return self._receive()
        sent = self.gathered = 0
        bucket: list[torch.Tensor] = []
        for mapping in model_mappings(self.arch, self.layout.pipeline_parallel):
            for tensor in self._gather(mapping):
                if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > self.staging_bytes:
                    sent += self._send(bucket)
                    bucket = []
                bucket.append(tensor)
        return sent + self._send(bucket) + self.gathered if self.rank == 0 else 0

    def _gather(self, mapping: PlacedMapping) -> list[torch.Tensor]:
        first = mapping.stage * self.layout.tensor_parallel * self.layout.data_parallel
        owners = range(first, first + self.layout.tensor_parallel)
        mine = self.parameters.get(mapping.megatron) if self.rank in owners else None
        if self.rank:
            if mine is not None:
                self.learner.send([mine], 0, 0).wait()
            return []
        whole = {name: torch.empty(matrix_shape(self.shapes[name])) for name in mapping.hf}
        for owner in owners:
            pieces = [p for p in self.pieces_of(owner) if p.parameter == mapping.megatron]
            shard = mine
            if owner:
                shard = torch.empty(parameter_shapes(pieces)[mapping.megatron])
                self.learner.recv([shard], owner, 0).wait()
                self.gathered += shard.nbytes
            for p in pieces:
                rows, cols = p.rows[1] - p.rows[0], p.cols[1] - p.cols[0]
                whole[p.tensor][slice(*p.rows), slice(*p.cols)] = shard[p.row : p.row + rows, p.col : p.col + cols]
        return list(whole.values())

    @cache
    def pieces_of(self, rank: int) -> list[Piece]:
        return learner_pieces(self.arch, self.layout, rank)

    def _send(self, bucket: list[torch.Tensor]) -> int:
        packed = torch.cat([tensor.reshape(-1) for tensor in bucket])
        self.pool.broadcast([packed], dist.BroadcastOptions()).wait()
        return packed.nbytes * (self.roster.world_size - self.roster.senders)

    def _receive(self) -> int:
        worker = self.roster.place(self.rank)[1]
        names = [name for mapping in model_mappings(self.arch, 1) for name in mapping.hf]
        parts = {piece.tensor: piece for piece in generator_pieces(self.arch, self.roster.tensor_parallel, worker)}
        while names:
            bucket, size = [], 0
            while names and (not bucket or size + nbytes(self.shapes[names[0]]) <= self.staging_bytes):
                bucket.append(names.pop(0))
                size += nbytes(self.shapes[bucket[-1]])
            packed = torch.empty(size // 4)
            self.pool.broadcast([packed], dist.BroadcastOptions()).wait()
            sizes = [nbytes(self.shapes[name]) // 4 for name in bucket]
            for name, flat in zip(bucket, packed.split(sizes), strict=True):
                part = parts[name]
                whole = flat.view(self.shapes[name][0], -1)
                target = self.parameters[part.parameter]
                source = whole[slice(*part.rows), slice(*part.cols)]
                target[part.row : part.row + source.shape[0], part.col : part.col + source.shape[1]] = source
        return 0


def nbytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


def resident_bytes(key: str) -> int:
    """`VmRSS` now, `VmHWM` at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def serve(make: Callable, options: argparse.Namespace, port: int, rank: int, pipe: Connection) -> None:
    """Pushes whenever told to; answers with (seconds, bytes on the wire, peak memory)."""
    member = make(options, port, rank)
    member.forget_peak()
    pipe.send("ready")
    while (verify := pipe.recv()) is not None:
        start = time.perf_counter()
        sent = member.push(verify)
        pipe.send((time.perf_counter() - start, sent, member.peak_bytes()))


class Group:
    """All processes of one way."""

    def __init__(self, make: Callable, options: argparse.Namespace, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(roster(options).world_size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(make, options, port, rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.senders = roster(options).senders
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def push(self, verify: bool = False) -> dict[str, float]:
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(verify)
        answers = [pipe.recv() for pipe in self.pipes]
        return {
            "seconds": time.perf_counter() - start,
            "stall": max(seconds for seconds, _, _ in answers[self.senders :]),
            "wire": answers[0][1],
            "learner_memory": max(peak for _, _, peak in answers[: self.senders]),
            "worker_memory": max(peak for _, _, peak in answers[self.senders :]),
        }

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)


def device(options: argparse.Namespace, rank: int) -> torch.device:
    if options.transport == "gloo":
        return torch.device("cpu")
    index = 0 if options.transport == "ipc" else rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def architecture(options: argparse.Namespace) -> Architecture:
    return Architecture(
        vocab_size=options.vocab,
        layers=options.layers,
        hidden_size=options.hidden,
        ffn_size=options.ffn,
        heads=options.hidden // 64,
        kv_heads=options.hidden // 128,
        head_dim=64,
        context_length=2048,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
    )


def layout(options: argparse.Namespace) -> LearnerLayout:
    tensor, pipeline, data = options.learner
    return LearnerLayout(tensor_parallel=tensor, pipeline_parallel=pipeline, data_parallel=data)


def roster(options: argparse.Namespace) -> Roster:
    names = [f"generator.{i}" for i in range(options.replicas)]
    return Roster(senders=layout(options).ranks, generators=names, tensor_parallel=options.generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learner", type=int, nargs=3, default=[2, 2, 1], metavar=("TP", "PP", "DP"))
    parser.add_argument("--generator", type=int, default=2, help="tensor-parallel workers of a replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--staging-mib", type=int, default=64)
    parser.add_argument("--transport", choices=["gloo", "ipc", "nccl"], default="gloo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=29650)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    groups = {"shards": Group(Shards, options, options.port)}
    if options.transport == "gloo" and options.dtype == "float32":
        groups["broadcast"] = Group(Broadcast, options, options.port + 1)
    ways = [way for way in WAYS if way.split(",")[0] in groups]
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for way in ways:
            result = groups[way.split(",")[0]].push(verify="verified" in way)
            if repeat:  # the first round warms up
                runs[way].append(result)
    for group in groups.values():
        group.end()
    report(options, {way: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for way, rs in runs.items()})


def report(options: argparse.Namespace, medians: dict[str, dict[str, float]]) -> None:
    arch = architecture(options)
    minimum = ITEM_BYTES[options.dtype] * options.replicas * elements_held(arch, options.generator)
    tensor, pipeline, data = options.learner
    print(
        f"{arch.num_parameters / 1e6:.0f} M parameters, learner TP{tensor} x PP{pipeline} x DP{data} -> "
        f"{options.replicas} generator(s) of TP{options.generator}, {options.dtype} over {options.transport}, "
        f"staging {options.staging_mib} MiB, median of {options.repeats}"
    )
    print(
        f"{'':18}{'seconds':>9}{'stall s':>9}{'MB on wire':>12}{'/ minimum':>10}{'learner MiB':>13}{'worker MiB':>12}"
    )
    for way, m in medians.items():
        print(
            f"{way:18}{m['seconds']:9.2f}{m['stall']:9.2f}{m['wire'] / 1e6:12.1f}{m['wire'] / minimum:10.3f}"
            f"{m['learner_memory'] / 2**20:13.0f}{m['worker_memory'] / 2**20:12.0f}"
        )
    if "broadcast" in medians:  # the one that is compared with runs over gloo only
        ours, theirs = medians["shards"], medians["broadcast"]
        memory = [max(m["learner_memory"], m["worker_memory"]) for m in (theirs, ours)]
        print(
            f"broadcast / shards: time {theirs['seconds'] / ours['seconds']:.2f}, peak memory {memory[0] / memory[1]:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"bytes_minimum": minimum, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
