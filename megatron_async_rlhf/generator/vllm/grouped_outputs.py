"""How sampled tokens leave vLLM's engine: several of a completion at a time.

After every step vLLM's engine tells its HTTP front of each running request's new token: to send them one by one, with completions
of a dozen tokens, took the front a third more processor time than in groups. The samples route (`routes`) answers when a
request has ended, so there a token may wait for those after it.

    engine loop ──> its output queue ──> GroupedOutputs ──> vLLM's sending thread ──> HTTP front

A request's first token, what ends it and what is told beside its tokens continue at once, with those that have waited. All continue
before the first token of other weights: vLLM records the version of a whole message.
"""

import queue
from collections import defaultdict, deque
from typing import Any

import numpy as np
from vllm.v1.engine.core import EngineCoreProc

GROUPED = "async-rlhf-grouped"  # in the names of requests whose tokens may wait
_TOKENS = 16  # that wait at most, so that vLLM's own metrics stay near the truth
_send = EngineCoreProc.process_output_sockets


def group_outputs() -> None:
    """From now on, in the engine of this process."""
    EngineCoreProc.process_output_sockets = _send_grouped


def _send_grouped(engine: EngineCoreProc, *args: Any, **kwargs: Any) -> None:
    engine.output_queue = GroupedOutputs(engine.output_queue)
    _send(engine, *args, **kwargs)


class GroupedOutputs:
    """The reader's end of an engine's output queue, for one thread. What is held of a request that is cancelled is let go
    with the next version of the weights."""

    def __init__(self, outputs: "queue.Queue[Any]") -> None:
        self.put_nowait = outputs.put_nowait
        self._outputs = outputs
        self._ready: deque[Any] = deque()
        self._held: defaultdict[int, dict[str, list[Any]]] = defaultdict(dict)  # by HTTP front and request
        self._version: str | None = None  # of the weights that sampled what is held

    def get(self) -> Any:
        """Waits for the next message: a number of the HTTP front and its outputs, or bytes when the engine has ended."""
        while not self._ready:
            message = self._outputs.get()
            if isinstance(message, bytes):
                self._ready.append(message)
            else:
                self._group(*message)
        return self._ready.popleft()

    def _group(self, front: int, message: Any) -> None:
        version = getattr(message, "weight_version", None)  # vLLM from 0.30 on; None where nothing was sampled
        if version is not None and version != self._version:
            self._release(type(message))
            self._version = version
        held = self._held[front]
        told, message.outputs = message.outputs, []
        for output in told:
            if GROUPED not in output.request_id:
                message.outputs.append(output)
                continue
            waiting = held.setdefault(output.request_id, [])
            waiting.append(output)
            if len(waiting) == _TOKENS or not _may_wait(output):
                message.outputs.append(_joined(held.pop(output.request_id)))
        if message.outputs and self._version is not None:
            message.weight_version = self._version  # of a message that only ends requests vLLM says none
        self._ready.append((front, message))

    def _release(self, message: type) -> None:
        """All that is held, as the weights' version that it has."""
        for front, held in self._held.items():
            if held:
                outputs = [_joined(waiting) for waiting in held.values()]
                self._ready.append((front, message(outputs=outputs, weight_version=self._version)))
        self._held.clear()


def _may_wait(output: Any) -> bool:
    """Whether an output is a token and no more. A request's first one tells when it was scheduled."""
    return output.finish_reason is None and output.events is None and output.prefill_stats is None


def _joined(outputs: list[Any]) -> Any:
    """The last of one request's outputs, with the tokens of all."""
    *before, last = outputs
    if before:
        last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
        logprobs = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
        if logprobs:
            last.new_logprobs = logprobs[0]._replace(
                # The first column is the sampled token's; whether there are others is for all requests of a step to decide.
                logprob_token_ids=np.concatenate([some.logprob_token_ids[:, :1] for some in logprobs]),
                logprobs=np.concatenate([some.logprobs[:, :1] for some in logprobs]),
                sampled_token_ranks=np.concatenate([some.sampled_token_ranks for some in logprobs]),
            )
    return last
