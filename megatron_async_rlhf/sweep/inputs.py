"""Points of one sweep that were run at different times must have had the same data and the same start."""

from megatron_async_rlhf.data.tokenizer import day_in
from megatron_async_rlhf.jobs.inputs import load_run_inputs
from megatron_async_rlhf.launch.input_digests import InputDigests, check_same_inputs, digest_inputs
from megatron_async_rlhf.sweep.points import Sweep
from megatron_async_rlhf.telemetry.files import INPUTS, POLICY_TEMPLATE_DIR


def check_inputs_of_earlier_points(sweep: Sweep) -> None:
    """That what the points already there were started with is what the others will be.

    Raises:
        ConfigError: one line naming the first run with other prompts or weights.
    """
    seen: list[tuple[dict, InputDigests]] = []  # points that differ in nothing that is read here are looked at once
    for point in sweep.points:
        config, run_dir = point.config, point.config.run.path
        if not (run_dir / INPUTS).is_file():
            continue
        template = run_dir / POLICY_TEMPLATE_DIR
        reads = config.model_dump(include={"model", "data", "reward", "generator"})
        reads |= {"seed": config.run.seed, "day": day_in(template)}
        now = next((inputs for read, inputs in seen if read == reads), None)
        if now is None:
            now = digest_inputs(config, load_run_inputs(config, template))
            seen.append((reads, now))
        check_same_inputs(run_dir, config, now, starts_over=True)
