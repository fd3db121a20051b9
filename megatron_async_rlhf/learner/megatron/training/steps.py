"""Passes of a model over micro-batches through Megatron's pipeline schedule.

`train_pass` runs forward and backward and leaves reduced gradients; `forward_pass` runs forward only. Both give what a
`Reading` makes of the last stage's output, a number per token: log-probabilities of a policy, values of a value model.
Shape legend: T tokens of a micro-batch's row, N of them completion tokens that this rank computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_async_rlhf.algorithms.reductions import Metrics, joined, reductions
from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.learner.megatron.context import sum_over_context
from megatron_async_rlhf.learner.megatron.layers.logprobs import vocab_parallel_logprobs
from megatron_async_rlhf.learner.megatron.layers.output import output_matrix
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.plain_values import at_first_rank, from_rank, of_all_ranks
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch

# (micro-batch, what was read of each token [T]) -> (its share of the step's loss, its share of each metric)
MicroLoss = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, Metrics]]
# (last stage's model, its output at the completion tokens [N, ...], their targets [N]) -> [N]
Reading = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def read_logprobs(placement: Placement, *, vocab_size: int, temperature: float) -> Reading:
    """Of a model that returns hidden states: each target's log-probability at the sampling temperature."""

    def read(model: torch.nn.Module, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_logprobs(
            hidden_NH,
            output_matrix(model),
            targets_N,
            vocab_size=vocab_size,
            temperature=temperature,
            placement=placement,
        )

    return read


def read_values(model: torch.nn.Module, values_N1: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Of a value model: the value of the state before each target."""
    return values_N1.squeeze(1)


class Passes:
    """Binds the schedule to one placement and a reading of the model's output."""

    def __init__(self, placement: Placement, read: Reading) -> None:
        self._placement = placement
        self._read = read

    def train_pass(self, chunks: list[torch.nn.Module], batches: list[MicroBatch], loss: MicroLoss) -> dict[str, float]:
        """Gradients of the summed micro-losses, and the metrics of all micro-batches and ranks together.

        Metrics are those of `loss`, `tokens`, and `padding`: the share of computed positions that held no token.

        Raises:
            LearnerError: on every rank alike: what `loss` raised on any of them, or metrics that not every micro-batch has.
        """
        failures: list[str] = []

        def megatron_loss(batch: MicroBatch, model: torch.nn.Module, output: torch.Tensor):
            per_token_T = self._per_token(batch, model, output)
            try:
                share, metrics = loss(batch, per_token_T)
            except LearnerError as error:  # the other ranks wait for this one in the schedule, so that goes on
                failures.append(str(error))
                share, metrics = per_token_T.sum() * 0.0, {}
            # Megatron divides by micro-batches and averages gradients over data-parallel ranks; our losses come
            # with the whole step's denominator in them already, so undo both.
            counts = {
                "tokens": torch.tensor(batch.num_tokens),
                "positions": torch.tensor(batch.tokens_T.numel()),
            }
            return share * len(batches) * self._placement.data_parallel, metrics | counts

        reports = self._run(chunks, batches, megatron_loss, forward_only=False)
        metrics = self._join_over_ranks(reports, batches, failures)
        positions = metrics.pop("positions")
        return metrics | {"padding": 1 - metrics["tokens"] / positions}

    @torch.no_grad()
    def forward_pass(self, chunks: list[GPTModel], batches: list[MicroBatch]) -> list[torch.Tensor]:
        """What is read of each micro-batch, [T] each, on the last stage; empty elsewhere."""

        def collect(
            batch: MicroBatch, model: torch.nn.Module, output: torch.Tensor, non_loss_data: bool = True
        ) -> torch.Tensor:
            return self._per_token(batch, model, output)

        with _evaluation_mode(chunks):
            return self._run(chunks, batches, collect, forward_only=True)

    def _per_token(self, batch: MicroBatch, model: torch.nn.Module, output_1TX: torch.Tensor) -> torch.Tensor:
        """[T]; 0 where the target is no completion token: no loss reads those, so nothing is computed for them."""
        mine_N = batch.mask_T[batch.local_positions_T].nonzero().squeeze(1)
        positions_N = batch.local_positions_T[mine_N]
        read_N = self._read(model, output_1TX.squeeze(0).index_select(0, mine_N), batch.targets_T[positions_N])
        read_T = read_N.new_zeros(len(batch.mask_T)).index_put((positions_N,), read_N)
        return sum_over_context(read_T)

    def _run(
        self, chunks: list[torch.nn.Module], batches: list[MicroBatch], on_output: Callable, *, forward_only: bool
    ) -> list:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward, on_output=on_output),
            # Every chunk sees the micro-batches in the same order.
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens_T),  # Megatron divides it over context and sequence parallel ranks
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _join_over_ranks(
        self, reports: list[Metrics], batches: list[MicroBatch], failures: list[str]
    ) -> dict[str, float]:
        """Metrics of all micro-batches and replicas, on every rank; which there are a reporting rank says.

        A micro-batch that only keeps ranks in step adds to sums alone, and nothing is in it to add.

        Raises:
            LearnerError: on every rank alike: the first failure of any.
        """
        placement, layout = self._placement, self._placement.layout
        mine = reports if placement.reports_loss else []
        last_stage = (layout.pipeline_parallel - 1) * layout.data_parallel * layout.tensor_parallel
        declared = reductions(mine[0]) if mine else None  # there is a report on `last_stage`
        how_of = from_rank(last_stage, declared, dict[str, str], placement.control)
        others = next((other for report in mine if (other := reductions(report)) != how_of), None)
        if others is not None:
            failures = [
                *failures,
                f"the loss has other metrics in one micro-batch than in another: {how_of} and {others}",
            ]
        _raise_together(failures, placement)
        real = [
            report for report, batch in zip(mine, batches, strict=False) if any(index >= 0 for index in batch.indices)
        ]
        metrics: dict[str, float] = {}
        for how in sorted(set(how_of.values())):
            names = [name for name, its in how_of.items() if its == how]
            totals = joined(mine if how == "sum" else real, names, how)
            if how == "mean":
                totals = torch.cat([totals, totals.new_tensor([len(real)])])
            dist.all_reduce(totals, op=_OPERATIONS[how], group=placement.control)
            if how == "mean":
                totals = totals[:-1] / totals[-1]
            metrics |= dict(zip(names, totals.tolist(), strict=True))
        return metrics


def _raise_together(failures: list[str], placement: Placement) -> None:
    """Every step exchanges a number for it, and the texts only where there are some."""
    count = torch.tensor([len(failures)])
    dist.all_reduce(count, group=placement.control)
    if count.item():
        everyone = of_all_ranks(failures[:1], list[str], placement.control)
        raise LearnerError(next(messages[0] for messages in everyone if messages))


@contextmanager
def _evaluation_mode(chunks: list[GPTModel]) -> Iterator[None]:
    """There is no dropout, so the numbers are the same. But in training mode Megatron prepares to compute layers again
    (`recompute`) whether or not there will be a backward pass, and Transformer Engine keeps FP8's scales for it: they would
    stay for ever, and the next backward pass would take them for its own.
    """
    were_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, were_training, strict=True):
            chunk.train(was_training)


def sum_over_replicas(totals: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Sum over data-parallel replicas of what their `reports_loss` ranks have, float64 on the host; on every rank."""
    if not placement.reports_loss:
        totals = torch.zeros_like(totals)
    dist.all_reduce(totals, group=placement.control)
    return totals


def _forward(batches: Iterator[MicroBatch], model: torch.nn.Module, *, on_output: Callable):
    batch = next(batches)
    output = model(
        input_ids=batch.tokens_T[batch.local_positions_T].unsqueeze(0),
        position_ids=None,  # rotary angles come from `packed`
        attention_mask=None,
        packed_seq_params=batch.packed,
    )
    return output, partial(on_output, batch, model)  # called on the last stage only


def gather_policy_logprobs(batches: list[MicroBatch], placement: Placement, count: int) -> list[list[float]]:
    """Each sequence's completion log-probabilities from `policy_T`, on rank 0; an empty list on other ranks."""
    rows: dict[int, list[float]] = {}
    if placement.reports_loss:
        for batch in batches:
            rows |= batch.split_completions(batch.policy_T)
    everyone = at_first_rank(rows, dict[int, list[float]], placement.control)
    found = {index: row for part in everyone for index, row in part.items()}
    return [found[index] for index in range(count)] if placement.rank == 0 else []
