"""Which metrics a run has follows from its configuration; all that are documented are some run's."""

from megatron_async_rlhf.config.metrics import metric_names
from megatron_async_rlhf.telemetry.metrics import METRICS


def test_metrics_follow_from_algorithm_and_reward(load):
    def names(**algorithm: object) -> list[str]:
        return metric_names(load(algorithm=algorithm).algorithm, "builtin")

    assert "dpo/margin" in names(type="online_dpo") and "dpo/margin" not in names(type="ppo")
    assert "value_loss" in names(type="ppo") and "value_loss" not in names(type="grpo")
    assert "kl_to_reference" in names(type="rloo") and "kl_to_reference" not in names(type="best_of_n")
    assert "kl_loss" in names(type="grpo") and "kl_loss" not in names(type="rloo")


def test_every_documented_metric_is_some_runs(load):
    sections = ({"type": "online_dpo"}, {"type": "ppo"}, {"type": "grpo", "correction": {"type": "truncate"}})
    found = {name for section in sections for name in metric_names(load(algorithm=section).algorithm, "gsm8k")}
    assert found | {"step", "time"} == {key.name for key in METRICS}
