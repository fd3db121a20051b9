"""What a run's figures say could be better, and what to do about it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_async_rlhf.report.run import ReportedRun
from megatron_async_rlhf.telemetry.summary import is_unfinished

_IDLE = 0.25  # of the loop: below that moving a device would gain little
_STALLED = 0.05
_CUT_OFF = 0.3
_SKIPPED = 0.5
_PADDED = 0.3
_GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats, mean over tokens: above that something differs, not rounding
_END = 0.1  # of the steps: what a run came to


class Advice(NamedTuple):
    """`what` was measured, and what to `do`."""

    what: str
    do: str


def advice_on(run: ReportedRun) -> list[Advice]:
    """The gravest first; empty if nothing stands out."""
    return [advice for rule in _RULES for advice in rule(run)]


def idle_shares(run: ReportedRun) -> tuple[float, float] | None:
    """Of generators (all of them at once) and learner, of the RL loop; None of a run without generators."""
    wall = run.summary.get("wall_seconds")
    if not wall or not run.summary.get("generate_busy_seconds"):
        return None
    return (
        max(0.0, 1 - run.summary["generate_busy_seconds"] / wall),
        max(0.0, 1 - run.summary["train_busy_seconds"] / wall),
    )


def stalled_share(run: ReportedRun) -> float:
    """Of the RL loop, in which generators waited for weights."""
    push, wall = run.summary.get("weight_sync", {}), run.summary.get("wall_seconds")
    return push["count"] * push["generator_stall_seconds_mean"] / wall if push and wall else 0.0


def _outcome(run: ReportedRun) -> Iterator[Advice]:
    status, error = run.summary.get("status"), run.summary.get("error")
    if is_unfinished(run.summary):
        yield Advice(
            "The run is still running, or it was killed; this is what there was when the page was made.",
            f"If it was killed: {_going_on(run)}.",
        )
    elif status in ("failed", "interrupted"):
        how, when = (f": {error}", ", once the cause is gone") if error else ("", "")
        what = _going_on(run)
        yield Advice(f"The run is {status}{how}.", f"{what[0].upper()}{what[1:]}{when}.")


def _going_on(run: ReportedRun) -> str:
    algorithm = run.summary.get("algorithm")
    if algorithm == "reward_model":
        return "the training of a reward model begins anew, with the same command"
    command = "sft" if algorithm == "sft" else "train"
    return f"with --resume, async-rlhf {command} {run.directory} continues from its last checkpoint"


def _proof(run: ReportedRun) -> Iterator[Advice]:
    push = run.summary.get("weight_sync", {})
    if push.get("mismatches"):
        yield Advice(
            f"{push['mismatches']} digests of pushed weights differed.",
            "Memory, a link or a card corrupts data: run async-rlhf doctor on the nodes, and resume on others.",
        )
    gap = run.summary.get("logprob_gap", {})
    limit = _GAP["float32" if run.config.generator.dtype == "float32" else "bfloat16"]
    if gap.get("tokens") and gap["mean_abs"] > limit:
        yield Advice(
            f"Learner and sampler disagree by {gap['mean_abs']:.3g} nats a token, of the same version.",
            "Train and sample in the same precision (learner.precision, generator.dtype), or correct for it "
            "(algorithm.correction).",
        )
    if run.summary.get("rewards_failed"):
        yield Advice(
            f"The reward failed on {run.summary['rewards_failed']:,} completions, which earned 0.",
            "The first failure is a note in logs/controller.log; `on_error: fail` of the reward would end the run there.",
        )


def _balance(run: ReportedRun) -> Iterator[Advice]:
    idle = idle_shares(run)
    if idle is None:
        return
    generators, learner = idle
    both = f"Generators wait {generators:.0%} of the time and the learner {learner:.0%}"
    if run.config.schedule.staleness_bound == 0:
        if min(generators, learner) > _IDLE and not run.config.takes_turns:
            is_async = run.config.schedule.mode == "async"
            change = "schedule.max_staleness: 1" if is_async else "schedule.mode: async"
            yield Advice(f"{both}: each waits for the other.", f"{change} lets them work at the same time.")
    elif min(generators, learner) > _IDLE:
        yield Advice(
            f"{both}: neither is the slower side.",
            "A larger schedule.max_staleness evens out steps that differ; a slow reward or judge holds both up.",
        )
    elif generators > _IDLE:
        yield Advice(
            f"Generators wait {generators:.0%} of the time for the learner.",
            "Give the learner more devices and generators fewer, or sample more per prompt "
            "(algorithm.samples_per_prompt); async-rlhf plan weighs the splits.",
        )
    elif learner > _IDLE:
        yield Advice(
            f"The learner waits {learner:.0%} of the time for samples.",
            "Give generators more devices (generator.replicas) and the learner fewer; async-rlhf plan weighs the splits.",
        )
    if (stalled := stalled_share(run)) > _STALLED:
        yield Advice(
            f"Generators stand still for weights {stalled:.0%} of the time.",
            "Larger steps (schedule.prompts_per_step) push less often.",
        )


def _learning(run: ReportedRun) -> Iterator[Advice]:
    rewards = run.held_out.get("reward", [])
    if len(rewards) > 1 and rewards[-1][1] < rewards[0][1]:
        yield Advice(
            f"The held-out reward fell from {rewards[0][1]:.3g} to {rewards[-1][1]:.3g}.",
            "Lower learner.learning_rate, or hold the policy closer to the reference (algorithm.beta, or the KL term).",
        )
    finished = run.mean("finished", _END)
    if finished is not None and finished < 1 - _CUT_OFF:
        yield Advice(
            f"In the end {1 - finished:.0%} of completions are cut off at {run.config.generator.max_new_tokens} tokens.",
            "Raise generator.max_new_tokens, or let algorithm.missing_eos_reward punish what does not end.",
        )
    skipped = run.mean("pairs_skipped_share")
    if skipped is not None and skipped > _SKIPPED:
        yield Advice(
            f"{skipped:.0%} of prompts taught nothing: all their completions earned the same.",
            "Sample more per prompt (algorithm.samples_per_prompt), or use prompts that are neither too easy nor too hard.",
        )


def _packing(run: ReportedRun) -> Iterator[Advice]:
    padding = run.mean("padding")
    if padding is not None and padding > _PADDED:
        yield Advice(
            f"{padding:.0%} of what the learner computes is padding.",
            "Raise learner.micro_batch_tokens, so that sequences pack better, as far as memory allows.",
        )


_RULES: tuple[Callable[[ReportedRun], Iterator[Advice]], ...] = (_outcome, _proof, _balance, _learning, _packing)
