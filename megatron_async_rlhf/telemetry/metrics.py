"""Every name that a run writes, with its unit and meaning: what docs/run_directory.md says, and tests hold the files to.

A name is added here first. `source` says who produces it, and thereby which test finds out that nobody does any more.
"""

from collections.abc import Iterable

from megatron_async_rlhf.config.metrics import possible_metrics
from megatron_async_rlhf.config.written_key import Key

METRICS = possible_metrics()

# Each line of warm_start.jsonl has some of the names above, for the warm start's own steps.
WARM_START = (
    "step", "time", "loss", "grad_norm", "learning_rate", "tokens", "padding", "tokens_per_s", "model_flops_utilisation",
    "time/reference_s", "time/forward_backward_s", "time/gradient_reduction_s", "time/optimizer_s",
)  # fmt: skip

SUMMARY = [
    Key(*row)
    for row in (
        ("schema", "-", "of this file and the `.jsonl` files: 2 since steps are counted from 1"),
        ("status", "-", "`completed`, `failed` or `interrupted`, which a run says of itself while it goes on: what is killed cannot say it later"),
        ("error", "-", "one line on what failed, naming the process; null if nothing did"),
        ("log_tail", "lines", "what that process's log says first of the cause, or its end; only of a failed run"),
        ("mode", "-", "`schedule.mode`"),
        ("algorithm", "-", "`algorithm.type`"),
        ("max_staleness", "steps", "the bound in force: 0 when synchronous, null without one"),
        ("steps", "steps", "optimizer steps that were made"),
        ("data.read", "records", "of `data.train` and `data.eval`; 0 of a simulation"),
        ("data.used", "records", "of them, prompts that are trained on or held out"),
        ("data.dropped", "records", "that are neither, by reason: bad ones with `data.bad_records: drop`, long ones with `data.long_prompts: drop`, the same prompts as held-out ones, those beyond `data.train_prompts` and `data.eval_prompts`"),
        ("startup_seconds", "s", "until the RL loop began: processes, warm start, first push, first evaluation; the sum over all starts of a resumed run"),
        ("wall_seconds", "s", "the RL loop: first batch submitted to last push done"),
        ("generate_busy_seconds", "s", "of it, something was being sampled, by any generator; not while weights change"),
        ("train_busy_seconds", "s", "of it, the learner had a rollout to train"),
        ("reward_busy_seconds", "s", "of it, a reward model's server was scoring (`reward_model`)"),
        ("overlap_efficiency", "share", "the larger of the two busy times over `wall_seconds`: 1 means the slower side never waited"),
        ("samples_generated", "completions", "that were begun: the sum of the next five, of a run with generators"),
        ("samples_trained", "completions", "that were trained on, once or in several epochs"),
        ("samples_not_selected", "completions", "that the algorithm passed over: online DPO takes the best and the worst of a prompt, and none where all earned the same; Best-of-N the best"),
        ("samples_cancelled", "completions", "given up before they were complete, their prompts sampled anew: their generator died, they were stragglers, or the run was interrupted"),
        ("samples_dropped", "completions", "of a completed run, complete ones that were lost: always 0, as staleness is paced"),
        ("samples_waiting", "completions", "complete, and not trained on yet when this was written; 0 of a completed run"),
        ("rewards_failed", "completions", "that earned 0 because a reward failed on them, with `reward.on_error: zero`; in evaluations too"),
        ("tokens_generated", "tokens", "of complete completions"),
        ("tokens_trained", "tokens", "of completions, once per epoch"),
        ("pairs_skipped", "prompts", "that taught nothing, because all their completions earned the same (online DPO)"),
        ("staleness.mean", "steps", "over all tokens of consumed batches"),
        ("staleness.max", "steps", "the largest"),
        ("staleness.histogram", "tokens", "of each staleness"),
        ("weight_sync.count", "pushes", "that arrived"),
        ("weight_sync.bytes", "bytes", "received by all generator workers, in all pushes"),
        ("weight_sync.bytes_minimum", "bytes", "that their shards hold, in all pushes"),
        ("weight_sync.seconds_mean", "s", "of a push, from the first pause to verified weights"),
        ("weight_sync.generator_stall_seconds_mean", "s", "of a push, that nothing was generated"),
        ("weight_sync.verified", "pushes", "whose digests were compared"),
        ("weight_sync.digests_compared", "digests", "one per slice and worker"),
        ("weight_sync.mismatches", "digests", "that differed; the run ends with the first"),
        ("logprob_gap.mean_abs", "nats", "difference of learner and sampler log-probability, mean over tokens both computed with the same version"),
        ("logprob_gap.max_abs", "nats", "the largest"),
        ("logprob_gap.tokens", "tokens", "that were compared"),
        ("eval", "-", "`before`, `after` and, with `schedule.eval_every`, `step <n>`: held-out metrics of one policy version by the names of `metrics.jsonl`, one completion per prompt at `generator.eval_temperature`, the same seeds each time; `logprob_gap` in nats, at the sampling temperature, of at most 32 completions. Of `async-rlhf eval` the estimates in `eval.json`, by part"),
        ("versions", "-", "of Python and every package that matters"),
    )
]  # fmt: skip

SAMPLES = [
    Key(*row)
    for row in (
        ("step", "-", "that trained on the group, from 1"),
        ("prompt", "-", "as written, without the chat template"),
        ("completions", "-", "texts, one per sample"),
        ("rewards", "reward", "of each, penalties included"),
        ("scores", "-", "of each, by part: `reward` without penalties, and the metrics of the rewards"),
        ("versions", "steps", "policy versions that sampled each"),
        ("finished", "-", "whether each ended by itself"),
    )
]

EVALUATIONS = [
    Key(*row)
    for row in (
        ("when", "-", "`before`, `after` or `step <n>`"),
        ("prompt", "-", "as written"),
        ("prompt_token_ids", "-", "the templated prompt"),
        ("completion", "-", "its text"),
        ("token_ids", "-", "its tokens, the one that ended it included"),
        ("reward", "reward", "without penalties; the mean is the evaluation's `reward`"),
    )
]

TRACE_ARGS = [
    Key(*row)
    for row in (
        ("version", "steps", "policy version: after a step, of a push, of an evaluation or of a checkpoint"),
        ("samples", "completions", "that were trained on, sampled or scored meanwhile, or held out"),
        ("tokens", "tokens", "of these completions; scored ones with their conversations"),
        ("bytes", "bytes", "of weights that arrived at generator workers"),
        ("digests", "digests", "that were compared"),
    )
]


def markdown(keys: Iterable[Key]) -> str:
    """The table in docs/run_directory.md."""
    rows = [f"| `{key.name}` | {key.unit} | {key.meaning} |" for key in keys]
    return "\n".join(["| key | unit | meaning |", "| --- | --- | --- |", *rows])
