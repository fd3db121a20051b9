import asyncio

import pytest
from controller_rig import LengthReward, Rig

from megatron_async_rlhf.algorithms.reward_shaping import RewardMoments
from megatron_async_rlhf.config.algorithms import OnlineDPOSection
from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.rewards.base import Score, Verifier
from megatron_async_rlhf.scheduler.scoring import logprob_gaps, mean_facts, score_group
from megatron_async_rlhf.scheduler.training_batch import select_training_samples
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="p", token_ids=[5, 6], reference={})


class First(Verifier):
    def check(self, prompt):
        pass

    def judge(self, prompt, completion):
        return Score(reward=completion.token_ids[0] / 10 if completion.token_ids else 0.0, metrics={"seen": 1.0})


def completion(*token_ids, finished=True):
    return Completion(
        token_ids=list(token_ids),
        logprobs=[-0.5] * len(token_ids),
        versions=list(range(len(token_ids))),
        finished=finished,
        text="",
    )


def scored(samples, missing_eos_reward=None):
    algorithm = OnlineDPOSection(missing_eos_reward=missing_eos_reward)
    return asyncio.run(score_group(PROMPT, samples, First(), algorithm, max_new_tokens=8))


def pairs_of(*groups):
    algorithm = OnlineDPOSection()
    return select_training_samples([scored(samples).group for samples in groups], algorithm, RewardMoments())[0]


def test_a_completion_without_an_end_earns_the_penalty_instead():
    samples = [completion(9, finished=False), completion(2)]
    assert scored(samples).group.rewards == [0.9, 0.2]
    penalised = scored(samples, -1.0)
    assert penalised.group.rewards == [-1.0, 0.2]
    facts = mean_facts([penalised])
    assert facts["reward"] == pytest.approx(0.55)
    assert facts["reward_penalised"] == pytest.approx(-0.4)
    assert facts["finished"] == 0.5
    assert facts["seen"] == 1.0
    assert penalised.without_penalties.rewards == [0.9, 0.2]


def test_a_metric_that_only_some_completions_have_is_the_mean_over_those():
    """Of groups scored before a resume that set `reward.on_error`."""
    before, after = scored([completion(9)]), scored([completion(2)])
    after.facts[0]["reward_failed"] = 1.0
    for groups in ([before, after], [after, before]):
        assert mean_facts(groups)["reward_failed"] == 1.0
        assert mean_facts(groups)["reward"] == pytest.approx(0.55)


def test_pairs_are_best_then_worst_and_ties_are_counted():
    batch = pairs_of([completion(3), completion(8, 1), completion()], [completion(4), completion(4, 4), completion(4)])
    sequences = [sequence for group in batch.groups for sequence in group.sequences]
    assert [s.token_ids for s in sequences] == [[5, 6, 8, 1], [5, 6]]
    assert [s.prompt_length for s in sequences] == [2, 2]
    assert batch.groups[0].rewards == [0.8, 0.0]
    assert batch.groups[0].sampler_logprobs == [[-0.5, -0.5], []]
    assert (batch.skipped, batch.margin) == (1, 0.8)


def test_a_batch_of_ties_has_no_pairs():
    batch = pairs_of([completion(1), completion(1)])
    assert (batch.groups, batch.completions, batch.skipped, batch.margin) == ([], [], 1, 0.0)


def test_gaps_are_taken_over_tokens_of_the_same_version_only():
    gaps = logprob_gaps([completion(1, 2), completion()], [[-0.25, -0.75], []], version=1)
    assert gaps == [0.25]
    assert logprob_gaps([completion(1)], [[-0.5]], version=3) == []
    with pytest.raises(ValueError):
        logprob_gaps([completion(1, 1)], [[-0.5]], version=1)


@pytest.mark.parametrize("fails", [False, True])
def test_groups_of_a_batch_are_scored_as_they_complete_and_leave_together(tmp_path, fails):
    """Scoring the first group begins while others are sampled; what is trained on does not depend on that."""

    class Watching(LengthReward):
        first = asyncio.Event()

        async def score(self, prompt, completions):
            self.first.set()
            if fails:
                raise RewardError("no score")
            return await super().score(prompt, completions)

    async def go() -> None:
        rig = Rig(tmp_path, reward=Watching(), mode="sync", steps=2)
        (generator,) = rig.generators
        sample, complete = generator.sample, 0

        async def last_waits_for_a_score(request):
            nonlocal complete
            completions = await sample(request)
            complete += 1
            if complete == 3:  # of the first batch
                async with asyncio.timeout(10):
                    await Watching.first.wait()
            return completions

        generator.sample = last_waits_for_a_score
        if fails:
            with pytest.raises(RewardError, match="no score"):
                await rig.controller.run()
            assert rig.recorder.totals.samples_cancelled == rig.recorder.totals.samples_generated == 6
            return
        await rig.controller.run()
        assert rig.order() == ["0", "p1", "1", "p2"]

    asyncio.run(go())
