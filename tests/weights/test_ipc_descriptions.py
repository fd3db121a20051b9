"""What a process tells another of its GPU memory, without a GPU: torch's own description arrives as it was, and no pickle."""

import torch
from torch.multiprocessing import reductions

from megatron_async_rlhf.weights.transports.ipc import IpcTransport


def test_torchs_description_arrives_as_it_was(monkeypatch):
    memory = torch.arange(64, dtype=torch.uint8)  # stands in for a staging buffer
    handles = (0, b"\x00handle\xff" * 6, 64, 512, False, b"counter", 3, b"event", True)
    described, rebuilt = [], []

    def reduce_tensor(tensor):
        arguments = (
            torch.Tensor,
            tensor.size(),
            tensor.stride(),
            0,
            torch.storage.TypedStorage,
            tensor.dtype,
            *handles,
        )
        described.append(arguments)
        return reductions.rebuild_cuda_tensor, arguments

    def rebuild(*arguments):
        rebuilt.append(arguments)
        return memory

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)

    class Control:
        rank, world_size, timeout_s = 0, 2, 1.0

    sender, receiver = (IpcTransport(Control(), torch.device("cpu")) for _ in range(2))
    for begin, size in ((0, 64), (48, 16), (5, 1)):
        header = sender._announcement(memory[begin : begin + size])
        assert torch.equal(receiver._sent(header, size), memory[begin : begin + size])
    assert rebuilt == described and len(described) == 1  # mapped once
    assert type(rebuilt[0][1]) is torch.Size
