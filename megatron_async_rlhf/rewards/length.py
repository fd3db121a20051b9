"""A penalty on the number of tokens, to be added to a reward that grows with it."""

from megatron_async_rlhf.config.rewards import LengthRewardSection
from megatron_async_rlhf.rewards.base import Score, Verifier
from megatron_async_rlhf.types import Completion, Prompt


class LengthReward(Verifier):
    """-per_token for each token beyond `free_tokens`, or farther than that from `target`; at least -max_penalty."""

    def __init__(self, section: LengthRewardSection) -> None:
        self._section = section

    def check(self, prompt: Prompt) -> None:
        """Every prompt will do."""

    def judge(self, prompt: Prompt, completion: Completion) -> Score:
        """The token that ended the completion counts too. No metrics: the reward says it all."""
        keys, length = self._section, len(completion.token_ids)
        distance = length if keys.target is None else abs(length - keys.target)
        penalty = min(keys.max_penalty, keys.per_token * max(0, distance - keys.free_tokens))
        return Score(reward=-penalty, metrics={})
