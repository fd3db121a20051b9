"""A rollout's samples reach exactly the ranks that train on them, whole, in pieces of any size."""

import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_async_rlhf.data.packing import plan_bins
from megatron_async_rlhf.learner import rollout as wire
from megatron_async_rlhf.learner.protocol import RolloutHeader, TrainRollout, decode_command
from megatron_async_rlhf.learner.rollout import Rollout, messages
from megatron_async_rlhf.types import Sequence, TrainingGroup

WORKER = Path(__file__).with_name("distribution_worker.py")
BUDGET = 40


def make_group(dice: random.Random, *, sampled: bool) -> TrainingGroup:
    """A pair; completions may be empty, token ids and log-probabilities have all their bits."""
    prompt, lengths = (
        [dice.randrange(2**31) for _ in range(dice.randrange(1, 6))],
        [dice.randrange(0, 20) for _ in "ab"],
    )
    return TrainingGroup(
        sequences=[
            Sequence(token_ids=prompt + [dice.randrange(2**31) for _ in range(n)], prompt_length=len(prompt))
            for n in lengths
        ],
        rewards=[dice.gauss(0, 1) for _ in lengths],
        sampler_logprobs=[[-dice.expovariate(1.0) for _ in range(n)] for n in lengths] if sampled else [],
    )


def rollouts() -> list[TrainRollout]:
    dice = random.Random(5)
    some = [[make_group(dice, sampled=True) for _ in range(n)] for n in (17, 0, 1, 40)]
    silent = [[make_group(dice, sampled=False) for _ in range(3)], some[0]]
    return [
        TrainRollout(id=1, version=3, epochs=2, mini_batches=some),
        TrainRollout(id=2, version=4, epochs=1, mini_batches=silent),
        TrainRollout(id=3, version=5, epochs=1, mini_batches=[[]]),
    ]


LAYOUTS = [(1, 1), (2, 2), (1, 3)]  # tensor and data parallel
TOKENS_IN_PIECE = [1, 100, 2**17]


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[list[Rollout]]]:
    """By layout and size of a piece: of every rank its rollouts."""
    root, jobs = tmp_path_factory.mktemp("received"), {}
    for layout in LAYOUTS:
        for tokens in TOKENS_IN_PIECE:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(wire, "TOKENS_IN_PIECE", tokens)
                commands = [list(messages(command)) for command in rollouts()]
            jobs[layout, tokens] = {
                "rollouts": commands, "unit": 2, "budget": BUDGET, "tokens_in_piece": tokens,
                "tensor_parallel": layout[0], "data_parallel": layout[1],
            }  # fmt: skip
    (root / "jobs.pickle").write_bytes(pickle.dumps(list(jobs.values())))
    done = subprocess.run([sys.executable, WORKER, root], capture_output=True, text=True, timeout=240)
    logs = "".join(path.read_text() for path in root.glob("*/*.log"))
    assert done.returncode == 0, done.stderr + logs
    return {
        key: [pickle.loads((root / f"{number}/{rank}.pickle").read_bytes()) for rank in range(key[0][0] * key[0][1])]
        for number, key in enumerate(jobs)
    }


def assert_equal(ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray], samples: set[int]) -> None:
    assert set(ours) == samples
    for sample in samples:
        assert ours[sample].dtype == theirs[sample].dtype
        assert ours[sample].tobytes() == theirs[sample].tobytes()


@pytest.mark.parametrize(("tensor", "data"), LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS_IN_PIECE)
def test_every_rank_gets_its_own_samples_and_no_others(received, tensor: int, data: int, tokens: int):
    for number, command in enumerate(rollouts()):
        whole = Rollout.of(command)
        for rank, own in enumerate(rollout[number] for rollout in received[(tensor, data), tokens]):
            assert (own.id, own.version, own.epochs) == (command.id, command.version, command.epochs)
            for ours, theirs in zip(own.mini_batches, whole.mini_batches, strict=True):
                for name in ("rewards", "lengths", "prompt_lengths", "are_sampled"):
                    assert getattr(ours, name) == getattr(theirs, name), name
                positions = [max(1, length - 1) for length in theirs.lengths]
                totals = [a + b for a, b in zip(positions[::2], positions[1::2], strict=True)]
                plan = plan_bins(totals, BUDGET, data)[rank // tensor]
                assert ours.bins == plan
                samples = {2 * unit + part for units in plan for unit in units for part in (0, 1)}
                assert_equal(ours.tokens, theirs.tokens, samples)
                assert_equal(ours.sampler_logprobs, theirs.sampler_logprobs, samples if theirs.are_sampled else set())


def test_a_rollout_is_a_header_and_pieces_of_neighbours():
    command = rollouts()[0]
    first, *rest = messages(command)
    header = decode_command(first)
    assert isinstance(header, RolloutHeader) and len(rest) == 1
    assert [len(sizes) for sizes in header.groups] == [17, 0, 1, 40]
    assert wire.pieces([]) == [] and wire.pieces([5]) == [range(1)]
    large = wire.TOKENS_IN_PIECE
    assert wire.pieces([1, large, 1, 1]) == [range(0, 2), range(2, 4)]
