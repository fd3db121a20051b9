"""Composition root of the controller process of `async-rlhf eval`: asks models, scores what they answer, writes it down.

    serve the policy ─> sample ─> serve `against` ─> sample ─> serve `kl_to` ─> log-probabilities ─> score ─> results

One model is served after the other, each with its real weights, and once although it is both `against` and `kl_to`; what
is there of an earlier start is not asked again, so that a model may not have to be served at all.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.generator.places import places
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.evaluated_models import (
    AGAINST,
    KL_TO,
    POLICY,
    EvaluatedModel,
    EvaluationInputs,
    load_evaluation,
    most_new_tokens,
    section_of,
    sources_of,
)
from megatron_async_rlhf.jobs.evaluation_results import (
    Answers,
    EvaluatedPrompt,
    answer_lines,
    evaluation_of,
    means,
    pair_lines,
)
from megatron_async_rlhf.jobs.kept_answers import KeptAnswers
from megatron_async_rlhf.jobs.lifecycle import run_to_the_end
from megatron_async_rlhf.jobs.reward_models import ServedRewards
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import (
    ANSWERS,
    ANSWERS_DIR,
    EVALUATION,
    PAIRS,
    RESOLVED_CONFIG,
    SERVED_DIR,
    replace_file,
    writing,
)
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import RunTotals
from megatron_async_rlhf.types import Completion, Prompt

Ask = Callable[[VLLMGenerator, Prompt], Awaitable[None]]


class _Questions(NamedTuple):
    """To one model, whose answers end up in `found`."""

    prompts: Sequence[Prompt]
    found: Mapping[int, object]
    ask: Ask

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.index not in self.found]


class Evaluator:
    """One evaluation, seen from the controller process."""

    def __init__(
        self, config: RunConfig, run_dir: Path, inputs: EvaluationInputs, addresses: Addresses, recorder: Recorder
    ) -> None:
        self._config, self._run_dir, self._inputs, self._recorder = config, run_dir, inputs, recorder
        self._section = section_of(config)
        self._urls = addresses.generators
        self._rewards = ServedRewards(config, inputs.reward, addresses.rewards, recorder)
        directory = run_dir / ANSWERS_DIR
        sides = [POLICY, *([AGAINST] if self._section.against is not None else [])]
        self._sampled: dict[str, KeptAnswers[list[Completion]]] = {
            side: KeptAnswers(directory / f"{side}.jsonl", list[Completion]) for side in sides
        }
        self._scored: dict[str, KeptAnswers[list[Score]]] = {
            side: KeptAnswers(directory / f"{side}_scores.jsonl", list[Score]) for side in sides
        }
        self._reference: KeptAnswers[list[list[float]]] = KeptAnswers(directory / f"{KL_TO}.jsonl", list[list[float]])

        self._kept: list[KeptAnswers[Any]] = [*self._sampled.values(), *self._scored.values(), self._reference]

    async def run(self) -> None:
        """All phases.

        Raises:
            GeneratorError: a server did not start, or is gone.
            RewardError: the reward gave no usable scores.
            WriteError: a file cannot be written.
        """
        self._recorder.phase("start")
        self._recorder.loop_started(startup_s=0.0)
        if self._section.against == "references":
            self._take_references()
        questions: dict[str, list[_Questions]] = {}
        for name in self._inputs.models:
            is_against = name == KL_TO and self._section.kl_to == self._section.against
            questions.setdefault(AGAINST if is_against else name, []).append(self._questions(name))
        for name, to_it in questions.items():
            await self._ask_all(name, self._inputs.models[name], to_it)
        self._recorder.phase("score")
        await self._rewards.start(self._run_dir, self._inputs.train)
        for side in self._sampled:
            await self._score(side)
        self._recorder.loop_ended()
        self._write()

    async def close(self) -> None:
        await self._rewards.close()
        for kept in self._kept:
            kept.close()

    def _take_references(self) -> None:
        tokenizer, kept = self._inputs.models[POLICY].tokenizer, self._sampled[AGAINST]
        for prompt in self._inputs.prompts:
            if prompt.index not in kept.found:
                kept.add(prompt.index, [_as_completion(prompt.solution or "", tokenizer)])

    def _questions(self, name: str) -> _Questions:
        if name == KL_TO:
            return _Questions(self._inputs.prompts, self._reference.found, self._score_tokens)
        model = self._inputs.models[name]
        prompts = [model.prompts[prompt.index] for prompt in self._inputs.prompts]
        return _Questions(prompts, self._sampled[name].found, self._sampler(name))

    async def _ask_all(self, name: str, model: EvaluatedModel, questions: Sequence[_Questions]) -> None:
        """Serve a model and ask it for what is missing, if anything is."""
        total = sum(len(each.missing) for each in questions)
        if not total:
            return
        self._recorder.phase(f"serve {name}")
        self._recorder.request_servers(name)
        servers = [self._connect(name, number, url, model.tokenizer) for number, url in enumerate(self._urls)]
        start = now()
        try:
            for server in servers:
                await server.wait_until_ready(self._config.generator.start_timeout_s)
            self._recorder.totals.startup_s += now() - start
            self._recorder.phase(f"ask {name}", prompts=total)
            done = 0

            async def one(ask: Ask, server: VLLMGenerator, prompt: Prompt) -> None:
                nonlocal done
                await ask(server, prompt)
                done += 1
                self._recorder.activity("generators", f"{name}: {done} of {total} requests")

            start = now()
            for (
                each
            ) in questions:  # one kind after the other: what is computed together is the same in every evaluation
                async with asyncio.TaskGroup() as tasks:
                    for place, prompt in enumerate(each.missing):
                        tasks.create_task(one(each.ask, servers[place % len(servers)], prompt))
            self._recorder.totals.generate_busy_s += now() - start
        finally:
            for server in servers:
                await server.close()

    def _connect(self, name: str, number: int, url: str, tokenizer: Tokenizer) -> VLLMGenerator:
        generator = self._config.generator
        return VLLMGenerator(
            f"{name}.{number}",
            url,
            tokenizer=tokenizer,
            tensor_parallel=generator.tensor_parallel,
            request_timeout_s=generator.request_timeout_s,
            probe_timeout_s=generator.probe_timeout_s,
            places=places(self._config),
            serves=name,
        )

    def _sampler(self, name: str) -> Ask:
        async def sample(server: VLLMGenerator, prompt: Prompt) -> None:
            request = SamplingRequest(
                prompt=prompt,
                samples=self._section.samples,
                seed=request_seed(self._section.seed, "eval", prompt.index),
                temperature=self._section.temperature,
                max_new_tokens=most_new_tokens(self._config),
                order=prompt.index,
                held_out=True,
            )
            self._sampled[name].add(prompt.index, await server.sample(request))

        return sample

    async def _score_tokens(self, server: VLLMGenerator, prompt: Prompt) -> None:
        """Log-probabilities of the policy's answers under the model that is served."""
        rows = []
        for completion in self._sampled[POLICY].found[prompt.index]:
            whole = prompt.token_ids + completion.token_ids
            rows.append(await server.logprobs(whole, len(prompt.token_ids)) if completion.token_ids else [])
        self._reference.add(prompt.index, rows)

    async def _score(self, side: str) -> None:
        """All answers of a side, by the reward alone: no penalty for a missing end or for length."""
        kept, sampled = self._scored[side], self._sampled[side].found

        async def one(prompt: Prompt) -> None:
            scores = await self._inputs.reward.score(prompt, sampled[prompt.index])
            self._recorder.rewards_failed([score.failure for score in scores if score.failure is not None])
            kept.add(prompt.index, scores)

        async with asyncio.TaskGroup() as tasks:
            for prompt in self._inputs.prompts:
                if prompt.index not in kept.found:
                    tasks.create_task(one(prompt))

    def _write(self) -> None:
        prompts = [self._evaluated(prompt) for prompt in self._inputs.prompts]
        content = evaluation_of(self._config, prompts)
        self._recorder.totals.evaluation = means(content)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answer_lines(self._config, prompts))
        files = [(ANSWERS, lines)]
        if self._section.pairs:
            pairs = pair_lines(self._config, prompts)
            files.append((PAIRS, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)))
            self._recorder.note(f"{len(pairs)} preference pairs from {len(prompts)} prompts: {self._run_dir / PAIRS}")
        files.append((EVALUATION, json.dumps(content, indent=1) + "\n"))  # last, as it says that the others are there
        for name, text in files:
            with writing(self._run_dir / name):
                replace_file(self._run_dir / name, text)

    def _evaluated(self, prompt: Prompt) -> EvaluatedPrompt:
        index = prompt.index
        sides = {
            side: Answers(completions=kept.found[index], scores=self._scored[side].found[index])
            for side, kept in self._sampled.items()
        }
        return EvaluatedPrompt(
            prompt=prompt,
            ours=sides[POLICY],
            theirs=sides.get(AGAINST),
            reference=self._reference.found[index] if KL_TO in self._inputs.models else None,
        )


def _as_completion(solution: str, tokenizer: Tokenizer) -> Completion:
    """A reference as if the policy had written it, and ended it."""
    token_ids = [*tokenizer.encode(solution), tokenizer.eos_token_id]
    return Completion(token_ids=token_ids, logprobs=[], versions=[], finished=True, text=solution)


async def run_job(run_dir: Path, addresses: Addresses) -> int:
    """Run all phases; returns the process's exit code. Every outcome leaves a summary."""
    config = load_config(run_dir / RESOLVED_CONFIG)
    inputs = load_evaluation(config, {name: run_dir / SERVED_DIR / name for name in sources_of(config)})
    totals = RunTotals(mode="sync", algorithm="eval", staleness_bound=0)
    recorder = Recorder(config, run_dir, EventStream(), totals=totals)
    evaluator = Evaluator(config, run_dir, inputs, addresses, recorder)
    try:
        return await run_to_the_end(evaluator.run(), recorder)
    finally:
        await evaluator.close()
        inputs.reward.close()
