"""Grouped outputs say what the engine's own do, token by token, in fewer parts."""

import queue
import random
from collections import defaultdict

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from megatron_async_rlhf.generator.vllm.grouped_outputs import GROUPED, GroupedOutputs

OURS, OTHER = f"3_{GROUPED}-7-0123abcd", "chatcmpl-5"
DEAD = b"dead"


def told(request: str, token: int | None, *, first: bool = False, ends: FinishReason | None = None, width: int = 1):
    """One request's part of a step. Of every token the log-probability is -token and the rank 2 token."""
    logprobs = None
    if token is not None:
        rows = np.array([[token] + [0] * (width - 1)])
        logprobs = LogprobsLists(rows, -rows.astype(np.float32), np.array([2 * token]))
    return EngineCoreOutput(
        request_id=request,
        new_token_ids=[] if token is None else [token],
        new_logprobs=logprobs,
        finish_reason=ends,
        events=[EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED)] if first else None,
    )


def step(*outputs: EngineCoreOutput, version: str | None = "0") -> tuple[int, EngineCoreOutputs]:
    return 0, EngineCoreOutputs(outputs=list(outputs), weight_version=version)


def grouped(*messages: tuple[int, EngineCoreOutputs]) -> list[tuple[int, EngineCoreOutputs]]:
    waiting: queue.Queue = queue.Queue()
    outputs = GroupedOutputs(waiting)
    for message in (*messages, DEAD):
        outputs.put_nowait(message)
    return list(iter(outputs.get, DEAD))


def records(messages: list[tuple[int, EngineCoreOutputs]]) -> dict[tuple[int, str], list[tuple]]:
    """By front and request: token, log-probability, rank and version of each token, and how the request ended."""
    seen: dict[tuple[int, str], list[tuple]] = defaultdict(list)
    for front, message in messages:
        for output in message.outputs:
            record = seen[front, output.request_id]
            if output.new_token_ids:
                ids, logprobs, ranks, _ = output.new_logprobs
                assert ids[:, 0].tolist() == output.new_token_ids and len(ids) == len(logprobs) == len(ranks)
                for token, logprob, rank in zip(ids[:, 0], logprobs[:, 0], ranks, strict=True):
                    record.append((int(token), float(logprob), int(rank), message.weight_version))
            if output.finish_reason is not None:
                record.append((output.finish_reason,))
    return dict(seen)


def lengths(messages: list[tuple[int, EngineCoreOutputs]], request: str = OURS) -> list[int]:
    return [len(o.new_token_ids) for _, message in messages for o in message.outputs if o.request_id == request]


def test_the_first_token_comes_at_once_and_the_others_in_groups():
    steps = [step(told(OURS, 0, first=True)), *(step(told(OURS, t), told(OTHER, t)) for t in range(1, 40))]
    steps.append(step(told(OURS, 40, ends=FinishReason.STOP), told(OTHER, 40)))
    messages = grouped(*steps)
    assert lengths(messages) == [1, 16, 16, 8] and lengths(messages, OTHER) == [1] * 40
    assert len(messages) == len(steps)  # each has the scheduler's figures of its step, whoever waits
    record = records(messages)[0, OURS]
    assert record == [*((t, -float(t), 2 * t, "0") for t in range(41)), (FinishReason.STOP,)]


@pytest.mark.parametrize("more", [{}, {"ends": FinishReason.LENGTH}, {"first": True}])
def test_a_token_waits_unless_more_is_told(more: dict):
    """As when a request ends, or was put back and scheduled anew."""
    last = told(OURS, 2, **more)
    assert lengths(grouped(step(told(OURS, 1)), step(last))) == ([2] if more else [])
    assert not more or (last.finish_reason, last.events is not None) == (more.get("ends"), "first" in more)


def test_what_waits_keeps_the_version_of_its_weights():
    messages = grouped(step(told(OURS, 1), version="4"), step(told(OURS, 2, ends=FinishReason.STOP), version="5"))
    assert [(m.weight_version, [o.new_token_ids for o in m.outputs]) for _, m in messages if m.outputs] == [
        ("4", [[1]]),
        ("5", [[2]]),
    ]
    # A pause cuts requests off in a message of no version.
    messages = grouped(step(told(OURS, 1), version="4"), step(told(OURS, None, ends=FinishReason.ABORT), version=None))
    assert records(messages) == {(0, OURS): [(1, -1.0, 2, "4"), (FinishReason.ABORT,)]}


def test_other_requests_of_a_step_may_want_more_logprobs():
    messages = grouped(step(told(OURS, 1, width=1)), step(told(OURS, 2, width=6, ends=FinishReason.STOP)))
    assert [row[0] for row in records(messages)[0, OURS][:2]] == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_requests_versions_and_ends(seed: int):
    draw = random.Random(seed)
    live = {(front, f"{i}_{name}"): 0 for front in (0, 1) for i in range(4) for name in (f"{GROUPED}-{i}", "cmpl")}
    messages, version = [], 0
    while live:
        version += draw.random() < 0.1
        for front in (0, 1):
            outputs = []
            for place in [place for place in live if place[0] == front and draw.random() < 0.9]:
                end = draw.choice(list(FinishReason)) if draw.random() < 0.03 else None
                token = None if end == FinishReason.ABORT else live[place]
                first = live[place] == 0 or draw.random() < 0.02
                outputs.append(told(place[1], token, first=first, ends=end, width=draw.choice([1, 3])))
                live[place] += 1
                if end is not None:
                    del live[place]
            messages.append((front, EngineCoreOutputs(outputs=outputs, weight_version=str(version))))
    before = records(messages)
    assert records(grouped(*messages)) == before and len(before) == 16
