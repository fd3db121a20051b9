"""Pushes whose bytes stay where the sender packed them, and those to ranks that cannot read them there."""

import gc
import os
import random

import pytest
import torch
from transfer_group import TransferGroup, assert_holds, random_weights

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.weights.transports import shared_memory

LAYOUT = LearnerLayout(tensor_parallel=2, pipeline_parallel=2)


def push(group: TransferGroup, seed: int) -> None:
    weights = random_weights(group.arch, torch.float32, seed)
    targets = group.targets(weights)
    verdict = group.push(weights, targets)[0]
    assert verdict.mismatches == [] and verdict.compared > 0
    assert_holds(targets, weights, group)


def test_what_can_be_read_is_not_copied(make_arch):
    group = TransferGroup(make_arch(kv_heads=2), LAYOUT, tensor_parallel=2, replicas=2, staging_bytes=2048)
    push(group, 0)
    for end in group._ends[LAYOUT.ranks :]:
        assert not any(buffer.any() for buffer in end._buffers)
    group.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_that_cannot_read_another_gets_its_bytes(make_arch, monkeypatch, seed):
    """As on two machines; any pair may be apart, in one direction or both."""
    met, chance = shared_memory._who_reads_whom, random.Random(seed)
    apart = {(owner, reader) for owner in range(8) for reader in range(8) if chance.random() < 0.5}

    def some(store, rank, world_size):
        pids, readers = met(store, rank, world_size)
        assert all(len(each) == world_size for each in readers), "threads of one process"
        return pids, [{reader for reader in each if (owner, reader) not in apart} for owner, each in enumerate(readers)]

    monkeypatch.setattr(shared_memory, "_who_reads_whom", some)
    group = TransferGroup(make_arch(kv_heads=2), LAYOUT, tensor_parallel=2, replicas=2, staging_bytes=2048)
    for version in range(3):
        push(group, version)
    group.close()


def test_only_memory_that_holds_the_secret_is_read():
    assert not shared_memory._holds(999999999, 3, "secret"), "there is no such process"
    ours, foreign = os.memfd_create(shared_memory._NAME), os.memfd_create("other")
    reading, writing = os.pipe()
    try:
        for descriptor in (ours, foreign, writing):
            os.write(descriptor, b"secret")
        assert shared_memory._holds(os.getpid(), ours, "secret")
        assert not shared_memory._holds(os.getpid(), ours, "another")
        assert not shared_memory._holds(os.getpid(), foreign, "secret")
        assert not shared_memory._holds(os.getpid(), reading, "secret")
        assert os.read(reading, 6) == b"secret", "a pipe of somebody else's is left alone"
    finally:
        for descriptor in (ours, foreign, reading, writing):
            os.close(descriptor)


def test_an_owner_that_is_gone_is_named(make_arch):
    group = TransferGroup(make_arch(kv_heads=2), LearnerLayout(), timeout_s=5.0)
    for transport in group.transports:
        transport._pids = [999999999] * 2
    weights = random_weights(group.arch, torch.float32)
    answers = group.push(weights, group.targets(weights))
    assert all(isinstance(answer, TransferError) for answer in answers)
    assert "from learner rank 0 failed on generator.0 rank 0" in str(answers[1])
    group.close()


def test_a_closed_group_leaves_nothing_behind(make_arch):
    def memories() -> int:
        gc.collect()
        return sum("memfd:" in os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink())

    before = memories()
    group = TransferGroup(make_arch(kv_heads=2), LAYOUT, tensor_parallel=2, replicas=2)
    push(group, 0)
    assert memories() >= before + 2 * group.roster.world_size
    group.close()
    del group
    assert memories() == before
