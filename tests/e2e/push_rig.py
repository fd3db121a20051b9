"""Real learner ranks and real vLLM servers with nothing above them: the test is the controller."""

import asyncio
import json
import os
import shutil
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.formats.directory import describe_weights
from megatron_async_rlhf.generator.protocol import Pause, SamplingRequest
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.jobs.inputs import RunInputs, load_run_inputs, make_model_template
from megatron_async_rlhf.launch.nodes import this_node
from megatron_async_rlhf.launch.plan import ProcessSpec, plan_processes
from megatron_async_rlhf.launch.process import LocalProcess, Process
from megatron_async_rlhf.launch.run_directory import create_run_directory
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import ExportWeights, StartReinforcement, TrainRollout, WaitUntilReady
from megatron_async_rlhf.run_secret import VARIABLE as SECRET_FILE
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.types import Completion, PushReport, Span, TrainingGroup

CONFIG = Path(__file__).with_name("tiny.yaml")
START_S = 180


class Receiver:
    """A generator that takes part in a push in a mode of its own, whatever the others do."""

    def __init__(self, generator: VLLMGenerator, how: Pause, recompute: bool) -> None:
        self.name, self._generator, self._how, self._recompute = generator.name, generator, how, recompute

    def __eq__(self, other: object) -> bool:
        """The generator that has met the learner is the same in any mode."""
        return isinstance(other, Receiver) and self._generator is other._generator

    def __hash__(self) -> int:
        return hash(self._generator)

    async def probe(self) -> None:
        await self._generator.probe()

    async def pause(self, how: Pause = "keep", *, clear_cache: bool = True) -> None:
        await self._generator.pause(self._how, clear_cache=clear_cache)

    async def join_transfer(self, info: dict, *, timeout_s: float) -> None:
        await self._generator.join_transfer(info, timeout_s=timeout_s)

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
        await self._generator.receive_weights(version=version, verify=verify, recompute=self._recompute)


class PushRig:
    """A running learner and generators; `weights` pushes between them."""

    def __init__(self, run_dir: Path, run_inputs: RunInputs, learner, generators, weights, processes) -> None:
        self.run_dir, self.run_inputs = run_dir, run_inputs
        self.learner, self.generators, self.weights = learner, generators, weights
        self.processes: dict[str, Process] = processes
        self.urls: list[str] = []
        self.version = 0

    async def push(self, version: int) -> tuple[PushReport, list[Span]]:
        """To all generators that are left."""
        return await self.weights.push(version, self.generators)

    async def change_weights(self) -> None:
        """An optimizer step big enough to matter: one prompt's solution preferred to another's."""
        solved = list(self.run_inputs.solved.values())
        chosen = [solved[(self.version * 8 + i) % len(solved)] for i in range(8)]
        groups = [
            TrainingGroup(sequences=chosen[i : i + 2], rewards=[1.0, 0.0], sampler_logprobs=[[], []])
            for i in range(0, 8, 2)
        ]
        await self.learner.execute(TrainRollout(version=self.version, mini_batches=[groups]))
        self.version += 1

    async def sample(self, generator: VLLMGenerator, prompts: int = 4) -> list[tuple[list[int], Completion]]:
        """A few completions at temperature 1 with the sampler's log-probabilities."""
        chosen = self.run_inputs.train[:prompts]
        tasks = [
            generator.sample(
                SamplingRequest(prompt=p, samples=1, seed=self.version * 100 + i, temperature=1.0, max_new_tokens=8)
            )
            for i, p in enumerate(chosen)
        ]
        await generator.resume()
        answers = await asyncio.gather(*tasks)
        await generator.pause()
        return [(p.token_ids, answer[0]) for p, answer in zip(chosen, answers, strict=True)]

    async def export(self) -> Path:
        """The learner's weights as a Hugging Face directory."""
        directory = self.run_dir / "export"
        describe_weights(self.run_dir / "model", directory, "float32")
        await self.learner.execute(ExportWeights(directory=str(directory)))
        return directory

    async def largest_logprob_gap(self, directory: Path | None = None) -> float:
        """Between every generator and Transformers on the same tokens; default: on the learner's weights as they are."""
        model = AutoModelForCausalLM.from_pretrained(directory or await self.export())
        gaps = []
        for generator in self.generators:
            for prompt, completion in await self.sample(generator):
                theirs = logprobs_of(model, prompt, completion.token_ids)
                gaps += [abs(a - b) for a, b in zip(theirs, completion.logprobs, strict=True)]
        return max(gaps)

    def signal(self, name: str, number: int) -> None:
        """To every process of a generator or learner rank: vLLM's engine and workers are children of the server."""
        os.killpg(self.processes[name].pid, number)

    def reset_memory_peaks(self) -> dict[str, int]:
        """Resident bytes now of every process of learner and generators, whose peaks count from here."""
        for pid in self._pids().values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def memory_peaks(self) -> dict[str, int]:
        return self._memory("VmHWM")

    def _memory(self, key: str) -> dict[str, int]:
        memory = {}
        for who, pid in self._pids().items():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            memory[who] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
        return memory

    def _pids(self) -> dict[str, int]:
        """`learner.0/1234` and the like: the started processes and all their children."""
        leaders = {process.pid: name for name, process in self.processes.items()}
        pids = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if (leader := int(fields[2])) in leaders and fields[0] != "Z":
                pids[f"{leaders[leader]}/{stat.parent.name}"] = int(stat.parent.name)
        return pids


@torch.no_grad()
def logprobs_of(model, prompt: list[int], completion: list[int]) -> list[float]:
    tokens = torch.tensor([prompt + completion])
    logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1).tolist()


@asynccontextmanager
async def push_rig(
    directory: Path, *overrides: str, alter: dict[str, dict] | None = None, without: dict[str, str] | None = None
):
    """Starts everything and ends it, whatever happens in between.

    Args:
        alter: name of a generator -> changes to the `config.json` it is started with.
        without: name of a generator -> an option its server is not given.
    """
    config = load_config(CONFIG, [f"run.dir={directory / 'run'}", "generator.temperature=1.0", *overrides])
    template = directory / "template"
    make_model_template(config, template)
    run_inputs = load_run_inputs(config, template)
    plan = plan_processes(
        config, config.run.path.absolute(), run_inputs.architecture.context_length, [this_node(config, gpus=0)]
    )
    run_dir, _ = create_run_directory(config, template)
    (run_dir / "logs").mkdir(exist_ok=True)
    specs = [*(_altered(spec, run_dir, (alter or {}).get(spec.name)) for spec in plan.generators), *plan.learners]
    for i, spec in enumerate(specs):
        if option := (without or {}).get(spec.name):
            arguments = [argument for argument in spec.arguments if argument != option]
            assert len(arguments) == len(spec.arguments) - 1
            specs[i] = msgspec.structs.replace(spec, arguments=arguments)
    for spec in specs:
        del spec.environment[SECRET_FILE]  # the test is no process of a run
    processes = {spec.name: LocalProcess(spec, run_dir / "logs", pipe_stdout=False) for spec in specs}
    arguments = plan.controller.arguments
    values = {key: [b for a, b in zip(arguments, arguments[1:], strict=False) if a == key] for key in arguments}
    host, _, port = values["--transfer"][0].rpartition(":")
    learner = LearnerClient(values["--learner"][0], timeout_s=config.learner.timeout_s)
    generators = [
        VLLMGenerator(
            f"generator.{i}",
            url,
            tokenizer=run_inputs.tokenizer,
            tensor_parallel=config.generator.tensor_parallel,
            request_timeout_s=240,
            probe_timeout_s=config.generator.probe_timeout_s,
        )
        for i, url in enumerate(values["--generator"])
    ]
    weights = WeightSync(learner, config, (host, int(port)))
    try:
        await _started(processes, learner, generators)
        rig = PushRig(run_dir, run_inputs, learner, generators, weights, processes)
        rig.urls = values["--generator"]
        yield rig
    finally:
        learner.close()
        for generator in generators:
            await generator.close()
        for process in processes.values():
            process.kill_group(signal.SIGCONT)
            process.kill_group(signal.SIGKILL)
        for process in processes.values():
            process.clean_up()


def _altered(spec: ProcessSpec, run_dir: Path, changes: dict | None) -> ProcessSpec:
    if not changes:
        return spec
    directory = run_dir / f"model-of-{spec.name}"
    shutil.copytree(run_dir / "model", directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    own = [str(directory) if argument == str(run_dir / "model") else argument for argument in spec.arguments]
    return msgspec.structs.replace(spec, arguments=own)


async def _started(processes: dict[str, Process], learner: LearnerClient, generators: list[VLLMGenerator]) -> None:
    deadline = time.monotonic() + START_S
    hello = asyncio.create_task(learner.execute(WaitUntilReady()))
    for generator in generators:
        while not await generator.is_ready():
            dead = [p for p in processes.values() if p.returncode is not None]
            assert not dead, f"{dead[0].name} {dead[0].ending()}\n" + "\n".join(dead[0].last_lines())
            assert time.monotonic() < deadline, f"{generator.name} is not ready"
            await asyncio.sleep(0.25)
    await hello
    await learner.execute(StartReinforcement())
