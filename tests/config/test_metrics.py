"""Which metrics a run has follows from its configuration; all that are documented are some run's."""

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.metrics import metric_names, possible_metrics
from megatron_async_rlhf.config.rewards import (
    BuiltinRewardSection,
    FunctionRewardSection,
    Gsm8kRewardSection,
    IfevalRewardSection,
    MathRewardSection,
)


def test_metrics_follow_from_algorithm_and_reward(load):
    def names(**algorithm: object) -> list[str]:
        return metric_names(load(algorithm=algorithm).algorithm, [BuiltinRewardSection()])

    assert "dpo/margin" in names(type="online_dpo") and "dpo/margin" not in names(type="ppo")
    assert "value_loss" in names(type="ppo") and "value_loss" not in names(type="grpo")
    assert "kl_to_reference" in names(type="rloo") and "kl_to_reference" not in names(type="best_of_n")
    assert "kl_loss" in names(type="grpo") and "kl_loss" not in names(type="rloo")


def test_in_a_list_every_reward_has_a_metric_of_its_own_and_its_name_before_the_others(load):
    rewards = [Gsm8kRewardSection(), FunctionRewardSection(function="own.py:brevity", on_error="zero")]
    names = set(metric_names(load().algorithm, rewards)) - set(metric_names(load().algorithm, []))
    own = {"reward/gsm8k", "gsm8k/exact", "gsm8k/well_formed", "reward/brevity", "brevity/reward_failed"}
    assert names == own


def test_every_documented_metric_is_some_runs(load):
    sections = ({"type": "online_dpo"}, {"type": "ppo"}, {"type": "grpo", "correction": {"type": "truncate"}})
    function = FunctionRewardSection(function="a.py:b", on_error="zero")
    endpoint = {"url": "http://localhost:8000/v1", "model": "m"}
    judges = [[JudgeRewardSection(form=form, **endpoint)] for form in ("pairwise", "pointwise")]
    rewards = ([Gsm8kRewardSection()], [function], [IfevalRewardSection()], [MathRewardSection()], *judges)
    found = {n for s in sections for r in rewards for n in metric_names(load(algorithm=s).algorithm, r)}
    assert found | {"step", "time"} == {key.name for key in possible_metrics()}
