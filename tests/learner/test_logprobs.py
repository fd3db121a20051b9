"""Log-probabilities in blocks against plain log-softmax in float64, alone and divided over ranks of real gloo groups."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core import parallel_state

from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.learner.megatron.layers.logprobs import vocab_parallel_logprobs

N, H, TEMPERATURE = 11, 6, 0.7


def inputs(vocab_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(vocab_size, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (N,), generator=generator)
    upstream = torch.randn(N, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def reference(vocab_size: int) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, upstream = inputs(vocab_size)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = (hidden @ weight.t() / TEMPERATURE).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    logprobs.backward(upstream)
    return logprobs.detach(), hidden.grad, weight.grad


def blocked(vocab_size: int, ranks: int, rank: int, block_elements: int) -> tuple[torch.Tensor, ...]:
    """What one rank computes."""
    hidden, weight, targets, upstream = inputs(vocab_size)
    share = -(-vocab_size // ranks)
    padded = torch.cat([weight, torch.full((share * ranks - vocab_size, H), 1e3, dtype=torch.float64)])
    hidden = hidden.float().requires_grad_()
    own = padded[rank * share : (rank + 1) * share].float().clone().requires_grad_()
    placement = SimpleNamespace(tensor_rank=rank, tensor_parallel=ranks)
    logprobs = vocab_parallel_logprobs(
        hidden, own, targets, vocab_size=vocab_size, temperature=TEMPERATURE, placement=placement,
        block_elements=block_elements,
    )  # fmt: skip
    logprobs.backward(upstream.float())
    return logprobs.detach(), hidden.grad, own.grad


@pytest.mark.parametrize("vocab_size", [1, 2, 37])
@pytest.mark.parametrize("block_elements", [1, 100, 10**6])
def test_equal_log_softmax_and_its_gradients(vocab_size: int, block_elements: int):
    for ours, theirs in zip(blocked(vocab_size, 1, 0, block_elements), reference(vocab_size), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 factors with float32 sums need a GPU")
def test_bf16_on_a_gpu_sums_blocks_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).bfloat16() for size in (96, 512))
    targets, upstream = torch.randint(512, (96,), generator=generator), torch.randn(96, generator=generator)
    exact_hidden, exact_weight = (matrix.double().requires_grad_() for matrix in (hidden, weight))
    exact = (exact_hidden @ exact_weight.t()).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    exact.backward(upstream.double())
    here, own = (matrix.cuda().requires_grad_() for matrix in (hidden, weight))
    logprobs = vocab_parallel_logprobs(
        here, own, targets.cuda(), vocab_size=512, temperature=1.0,
        placement=SimpleNamespace(tensor_rank=0, tensor_parallel=1), block_elements=512 * 7,
    )  # fmt: skip
    logprobs.backward(upstream.cuda())
    for ours, theirs in ((logprobs, exact), (here.grad, exact_hidden.grad), (own.grad, exact_weight.grad)):
        error = (ours.detach().cpu().double() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < 0.01, error


def run_rank(rank: int, ranks: int, port: int, sizes: list[int], results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    parallel_state.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    for vocab_size in sizes:
        logprobs, grad_hidden, grad_weight = blocked(vocab_size, ranks, rank, 50)
        results.put((rank, vocab_size, logprobs.tolist(), grad_hidden.tolist(), grad_weight.tolist()))
    dist.destroy_process_group()


def test_divided_over_ranks_with_padding():
    """37 leaves one padded row, 5 over 4 ranks a rank without any row of its own."""
    ranks, sizes = 4, [37, 5, 8]
    (port,) = free_ports(1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=run_rank, args=(r, ranks, port, sizes, results)) for r in range(ranks)]
    for process in processes:
        process.start()
    collected = [results.get(timeout=60) for _ in range(ranks * len(sizes))]
    for process in processes:
        process.join(30)
    for vocab_size in sizes:
        logprobs, grad_hidden, grad_weight = reference(vocab_size)
        by_rank = {r: rest for r, size, *rest in collected if size == vocab_size}
        assert len(by_rank) == ranks
        for found in by_rank.values():
            torch.testing.assert_close(torch.tensor(found[0]).double(), logprobs, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(torch.tensor(found[1]).double(), grad_hidden, atol=2e-5, rtol=1e-5)
        whole = torch.cat([torch.tensor(by_rank[r][2]) for r in range(ranks)]).double()
        torch.testing.assert_close(whole[:vocab_size], grad_weight, atol=2e-5, rtol=1e-5)
        assert not whole[vocab_size:].any()
