"""The examples in docs/rewards.md: each is a configuration, its data have what the reward reads, and it scores as it says."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import judge_server
import pytest
import yaml
from msgspec import Struct
from scoring_server import score_of, serving
from tiny_reward_model import describe_reward_model

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.rewards import REWARDS
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.jobs.inputs import check_functions, load_run_inputs, make_model_template
from megatron_async_rlhf.jobs.reward_models import ServedRewards
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Message, Prompt

ROOT = Path(__file__).parents[2]
MODEL = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 512}"
BLOCK = re.compile(r"```(\w+)\n(.*?)```|^(\|.*?)\n\n", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"\| `(.+?)` \| (?:(\d+) \| )?(-?[\d.]+) \|")


class Example(Struct):
    """One of the configurations, with what stands behind it up to the next one.

    Attributes:
        files: by their names, data and code.
        scored: completion, tokens of it (None: any number), reward.
    """

    config: str
    files: dict[str, str]
    scored: list[tuple[str, int | None, float]]

    @property
    def types(self) -> list[str]:
        reward = yaml.safe_load(self.config)["reward"]
        return [entry["type"] for entry in (reward if isinstance(reward, list) else [reward])]

    @property
    def train(self) -> str:
        return yaml.safe_load(self.config).get("data", {}).get("train", "builtin")


def examples() -> list[Example]:
    found: list[Example] = []
    for kind, content, table in BLOCK.findall((ROOT / "docs/rewards.md").read_text(encoding="utf-8")):
        if kind == "yaml":
            found.append(Example(content, {}, []))
        elif kind == "json":
            found[-1].files[found[-1].train] = content
        elif kind == "python" and content.startswith("# "):
            found[-1].files[content.split("\n")[0][2:]] = content
        elif table.startswith("| completion |"):
            rows = ROW.findall(table)
            found[-1].scored += [
                (text.replace(r"\n", "\n"), int(tokens) if tokens else None, float(reward))
                for text, tokens, reward in rows
            ]
    return found


EXAMPLES = examples()


def named(example: Example) -> str:
    return "-".join(example.types)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of all examples and the project's own."""
    for example in EXAMPLES:
        for name, content in example.files.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return tmp_path


def loaded(example: Example, directory: Path, *overrides: str) -> RunConfig:
    path = directory / "config.yaml"
    path.write_text(example.config, encoding="utf-8")
    return load_config(path, [MODEL, "data.eval_prompts=1", *overrides])


def test_every_type_has_an_example():
    assert {kind for example in EXAMPLES for kind in example.types} == set(REWARDS)


def completion(text: str, tokens: int | None = None) -> Completion:
    token_ids = [1] * (tokens or len(text))
    return Completion(token_ids=token_ids, logprobs=[0.0] * len(token_ids), versions=[0], finished=True, text=text)


async def score(
    config: RunConfig, place: Path, completions: Callable[[Prompt], list[Completion]]
) -> tuple[Prompt, list[Score]]:
    """The first prompt, and what these completions of it earn; with the checks before a run."""
    make_model_template(config, place / "template")
    inputs = load_run_inputs(config, place / "template")
    await asyncio.to_thread(check_functions, config, inputs)
    prompts = [*inputs.train, *inputs.eval]
    if config.data.train != "builtin":
        assert len(prompts) == len(Path(config.data.train).read_text(encoding="utf-8").splitlines())
    prompt = next((prompt for prompt in prompts if prompt.origin.endswith(":1")), prompts[0])
    served = ServedRewards(config, inputs.reward, [], Recorder(config, place, EventStream()))
    try:
        return prompt, await inputs.reward.score(prompt, completions(prompt))
    finally:
        inputs.reward.close()
        await served.close()


def within(seconds: float, scores: Awaitable) -> tuple[Prompt, list[Score]]:
    async def go() -> tuple[Prompt, list[Score]]:
        async with asyncio.timeout(seconds):
            return await scores

    return asyncio.run(go())


@pytest.mark.slow  # two of them load verifiers
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.scored], ids=named)
def test_examples_score_as_they_say(example: Example, place: Path):
    made = [completion(text, tokens) for text, tokens, _ in example.scored]
    _, scores = within(60, score(loaded(example, place), place, lambda prompt: made))
    assert [s.reward for s in scores] == pytest.approx([reward for _, _, reward in example.scored], abs=5e-4)


def only(kind: str) -> Example:
    (example,) = [example for example in EXAMPLES if example.types == [kind]]
    return example


def test_what_scores_without_a_table_is_asked_elsewhere():
    assert {named(example) for example in EXAMPLES if not example.scored} == {"builtin", "judge", "reward_model"}


def test_the_builtin_example(place: Path):
    config = loaded(only("builtin"), place)
    _, scores = within(60, score(config, place, lambda prompt: [completion(prompt.solution or ""), completion("?")]))
    assert scores[0].reward == 1 and scores[1].reward < 0.6


def test_the_judge_of_the_example_is_asked(place: Path):
    async def go() -> tuple[Prompt, list[Score]]:
        async with judge_server.serving(judge_server.longer_is_better) as server:
            config = loaded(only("judge"), place, f"reward.url={server.url}")
            return await score(config, place, lambda prompt: [completion(text) for text in ("a", "ccc", "bb")])

    _, scores = within(60, go())
    assert [s.reward for s in scores] == [0.0, 1.0, 0.5]


def test_the_reward_model_of_the_example_is_asked(place: Path):
    describe_reward_model(place / "rm", context=512)
    texts = ("a", "ccc")

    async def go() -> tuple[Prompt, list[Score]]:
        async with serving(1) as (server,):
            example = only("reward_model")
            section = yaml.safe_load(example.config)["reward"]
            # The servers are not started here, and nothing is subtracted.
            keys = section | {"model": str(place / "rm"), "url": server.url, "replicas": 1, "center_on_solutions": 0}
            return await score(
                loaded(example, place, f"reward={keys}"), place, lambda prompt: [*map(completion, texts)]
            )

    prompt, scores = within(60, go())
    tokenizer = Tokenizer.load(place / "rm")
    written = (tokenizer.render_conversation([*prompt.messages, Message("assistant", text)]) for text in texts)
    assert [s.reward for s in scores] == [score_of(ids) for ids in written]
