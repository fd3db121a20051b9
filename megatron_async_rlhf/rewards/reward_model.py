"""A reward model as a reward: its own template around conversation and completion, its servers' score for each.

conversation, completion ──> the reward model's template and tokenizer ──> servers ──> logit - mean of solutions
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import ConfigError, DataError, GeneratorError, RewardError
from megatron_async_rlhf.models.classifier import read_classifier
from megatron_async_rlhf.rewards.base import Reward, Score
from megatron_async_rlhf.rewards.failing import failed_score, plain_scores, scores_after
from megatron_async_rlhf.rewards.reward_servers import RewardServers
from megatron_async_rlhf.rewards.weighted_sum import WeightedSum
from megatron_async_rlhf.types import Completion, Message, Prompt

_WAY_OUT = "See the log of the server"
_SOLUTIONS_TOGETHER = 16  # in one request


class ModelReward:
    """The score of a served sequence classifier; `load` it first, `connect` it before the first score.

    Attributes:
        center: what is subtracted from every score.
        servers: None until it is connected.
    """

    def __init__(self, section: RewardModelSection) -> None:
        self.section = section
        self.center = 0.0
        self.servers: RewardServers | None = None
        self._key = "reward"

    def load(self, key: str, date_from: Path | None) -> None:
        """Read description and tokenizer.

        Args:
            key: of the section in the configuration.
            date_from: the directory with the date that chat templates take for today; None: there is no tokenizer, and
                nothing will be scored.

        Raises:
            ConfigError, DataError: no reward model is there, or its tokenizer does not fit it; one line.
        """
        section, self._key = self.section, key
        model = read_classifier(f"{key}.model", section.model)
        longest = section.context_length or model.context_length
        if longest > model.context_length:
            raise ConfigError(
                f"{key}.context_length = {longest} is above the {model.context_length} tokens (max_position_embeddings) that "
                f"{key}.model = {section.model} was made for"
            )
        if model.heads % section.tensor_parallel:
            raise ConfigError(
                f"{key}.tensor_parallel = {section.tensor_parallel} does not divide the {model.heads} attention heads of "
                f"{key}.model = {section.model}"
            )
        if date_from is None:
            return
        try:
            tokenizer = Tokenizer.load(section.model, template=section.chat_template, date_from=date_from)
        except DataError as error:
            raise DataError(f"{key}.model: {error}") from None
        index, token = tokenizer.last_token
        if index >= model.vocab_size:
            raise ConfigError(
                f"{key}.model = {section.model}: the tokenizer's token {token!r} has id {index}, the model only "
                f"{model.vocab_size} embeddings (vocab_size); give the tokenizer that belongs to the model"
            )
        self._tokenizer, self._pad, self.context_length = tokenizer, model.pad_token_id, longest

    def check(self, prompt: Prompt) -> None:
        """Raises DataError if even an empty completion of the prompt is too long for the model, or its template fails."""
        if (length := self.length(prompt)) > self.context_length:
            raise DataError(
                f"{prompt.name} has {length} tokens in the chat template of {self._key}.model = {self.section.model}, which "
                f"reads {self.context_length}; lower data.max_prompt_tokens with data.long_prompts = drop, or remove it"
            )

    def length(self, prompt: Prompt) -> int:
        """Tokens of the prompt with an empty completion, as this model reads them."""
        return len(self._tokenizer.render_conversation([*_messages(prompt), Message("assistant", "")]))

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """Metrics: with `on_error = zero` `reward_failed`, 1 if there is no score.

        A completion that is too long for the model fails alone; all of them do if the servers give no scores.
        """
        on_error = self.section.on_error
        texts = [completion.text for completion in completions]

        def failure(error: Exception | str) -> str:
            return f"reward model {self.section.model}: {error}; the prompt is {prompt.name}"

        try:
            sequences = await asyncio.to_thread(self._sequences, prompt, texts)
            raw = await self._scores([ids for ids in sequences if on_error == "fail" or self._fits(ids)])
        except (RewardError, GeneratorError, DataError) as error:
            return scores_after(failure(error), len(completions), on_error, self._key, way_out=_WAY_OUT)
        scores = iter(plain_scores([score - self.center for score in raw], on_error))
        return [next(scores) if self._fits(ids) else failed_score(failure(self._too_long(ids))) for ids in sequences]

    async def mean_of_solutions(self, prompts: Sequence[Prompt], seed: int) -> float:
        """The mean score of `center_on_solutions` solutions, drawn with the seed, before anything is subtracted.

        Raises:
            RewardError: one of them has no score.
        """
        drawn = self.drawn_solutions(prompts, seed)

        async def one(prompt: Prompt) -> float:
            try:
                sequences = await asyncio.to_thread(self._sequences, prompt, [prompt.solution or ""])
                (score,) = await self._scores(sequences)
            except (RewardError, GeneratorError, DataError) as error:
                raise RewardError(
                    f"{self._key}.center_on_solutions: {error}; it is the solution of {prompt.name}"
                ) from None
            return score

        scores: list[float] = []
        for begin in range(0, len(drawn), _SOLUTIONS_TOGETHER):
            scores += await asyncio.gather(*map(one, drawn[begin : begin + _SOLUTIONS_TOGETHER]))
        return fmean(scores)

    def drawn_solutions(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """
        Raises:
            ConfigError: there are fewer prompts with a solution.
        """
        solved, count = [prompt for prompt in prompts if prompt.solution is not None], self.section.center_on_solutions
        if len(solved) < count:
            raise ConfigError(
                f"{self._key}.center_on_solutions = {count}: only {len(solved)} prompts to train on have a solution; lower it, "
                "or set data.solution_field"
            )
        return Random(f"center/{seed}").sample(solved, count)

    def sources(self) -> list[Path]:
        return [] if self.section.chat_template is None else [self.section.chat_template]

    def close(self) -> None: ...

    async def _scores(self, sequences: Sequence[list[int]]) -> list[float]:
        """
        Raises:
            RewardError: one is too long. RewardError, GeneratorError: as `RewardServers.score`.
        """
        for ids in sequences:
            if not self._fits(ids):
                raise RewardError(self._too_long(ids))
        assert self.servers is not None  # it is connected before anything is sampled
        return await self.servers.score(sequences) if sequences else []

    def _fits(self, ids: list[int]) -> bool:
        return len(ids) <= self.context_length

    def _too_long(self, ids: list[int]) -> str:
        return (
            f"a completion makes {len(ids)} tokens with its conversation, above the {self.context_length} that the model "
            "reads: lower generator.max_new_tokens or data.max_prompt_tokens"
        )

    def _sequences(self, prompt: Prompt, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the conversation with each text as its answer, up to where the model is read out."""
        messages = _messages(prompt)
        return [self._sequence([*messages, Message("assistant", text)]) for text in texts]

    def _sequence(self, messages: Sequence[Message]) -> list[int]:
        ids = self._tokenizer.render_conversation(messages)
        # Transformers reads a classifier out at the last token that does not pad, which a template's last one may do.
        while len(ids) > 1 and ids[-1] == self._pad:
            ids.pop()
        return ids


def reward_models_in(reward: Reward) -> list[ModelReward]:
    """All reward models that a reward asks, in the order of the configuration."""
    if isinstance(reward, WeightedSum):
        return [model for part in reward.parts for model in reward_models_in(part.reward)]
    return [reward] if isinstance(reward, ModelReward) else []


def _messages(prompt: Prompt) -> Sequence[Message]:
    return prompt.messages or one_turn(prompt.text)
