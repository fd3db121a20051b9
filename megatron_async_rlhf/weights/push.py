"""One weight push over a group of learner rank 0 and all generator workers: both halves side by side.

Sender: pack tensors into a bucket -> broadcast it -> next bucket ... -> collect every receiver's digests.
Receiver: broadcast -> unpack -> digest -> hand to the model ... -> send digests back.

The digests a receiver sends are of the very tensors it hands to vLLM's loader.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.buckets import TensorSpec, plan_buckets
from megatron_async_rlhf.weights.digest import differing, digest
from megatron_async_rlhf.weights.transports.gloo import GlooGroup

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def send_weights(
    group: GlooGroup,
    specs: Sequence[TensorSpec],
    tensors: NamedTensors,
    *,
    staging_bytes: int,
    verify: bool,
    receiver_names: Sequence[str],
) -> tuple[int, list[str]]:
    """Push every tensor to every receiver.

    Args:
        tensors: in the order of `specs`.
        receiver_names: who rank 1, 2, ... are, for messages.

    Returns:
        Digests compared, and `receiver: tensor` of each that differs.

    Raises:
        TransferError: a tensor that is not the announced one, or a peer that failed or timed out.
    """
    stream = iter(tensors)
    sent = bytearray()
    for index, bucket in enumerate(plan_buckets(specs, staging_bytes)):
        buffer = torch.empty(sum(spec.num_bytes for spec in bucket), dtype=torch.uint8)
        offset = 0
        for spec in bucket:
            name, tensor = next(stream, (None, None))
            if name != spec.name or list(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
                raise TransferError(f"pack: expected tensor {spec.name} {spec.shape}, the learner gave {name}")
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            buffer[offset : offset + spec.num_bytes] = flat
            offset += spec.num_bytes
            if verify:
                sent += digest(tensor)
        group.broadcast(buffer, f"bucket {index} ({bucket[0].name} ... {bucket[-1].name})")
    if not verify:
        return 0, []
    mismatches = []
    for rank, receiver in enumerate(receiver_names, start=1):
        answer = torch.empty(len(sent), dtype=torch.uint8)
        group.receive(answer, rank, f"digests of {receiver}")
        names = [spec.name for spec in specs]
        mismatches += [f"{receiver}: {name}" for name in differing(names, bytes(sent), answer.numpy().tobytes())]
    return len(specs) * len(receiver_names), mismatches


def receive_weights(
    group: GlooGroup,
    specs: Sequence[TensorSpec],
    load: Callable[[NamedTensors], object],
    *,
    staging_bytes: int,
    verify: bool,
) -> None:
    """Receive what `send_weights` sends with the same arguments and hand it to `load`, bucket by bucket."""
    received = bytearray()
    for index, bucket in enumerate(plan_buckets(specs, staging_bytes)):
        buffer = torch.empty(sum(spec.num_bytes for spec in bucket), dtype=torch.uint8)
        group.broadcast(buffer, f"bucket {index} ({bucket[0].name} ... {bucket[-1].name})")
        named = []
        offset = 0
        for spec in bucket:
            flat = buffer[offset : offset + spec.num_bytes]
            named.append((spec.name, flat.view(getattr(torch, spec.dtype)).view(spec.shape)))
            offset += spec.num_bytes
        if verify:
            for _, tensor in named:
                received += digest(tensor)
        load(named)
    if verify:
        group.send(torch.frombuffer(received, dtype=torch.uint8), 0, "digests to the learner")
