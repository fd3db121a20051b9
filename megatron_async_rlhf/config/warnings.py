"""What a configuration allows but its user should know."""

from megatron_async_rlhf.config.algorithm_keys import PolicyGradientKeys
from megatron_async_rlhf.config.root import RunConfig


def config_warnings(config: RunConfig) -> list[str]:
    """One line each, naming the keys."""
    lines = []
    algorithm, bound = config.algorithm, config.schedule.staleness_bound
    if isinstance(algorithm, PolicyGradientKeys) and bound != 0 and not algorithm.is_corrected:
        staleness = "null (no bound)" if bound is None else bound
        lines.append(
            f"algorithm.type = {algorithm.type} with schedule.max_staleness = {staleness} trains on samples of older "
            "policies and nothing corrects for it: PPO-like losses get worse with every step of staleness; set "
            "algorithm.correction.type (decoupled, truncate, mask, mask_sequences) or algorithm.ratio_base = sampler, or "
            "use online_dpo"
        )
    if config.schedule.in_flight_updates != "none" and bound == 0:
        lines.append(
            f"schedule.in_flight_updates = {config.schedule.in_flight_updates} has no effect without staleness: nothing "
            "is under way when weights change"
        )
    return lines
