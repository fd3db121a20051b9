"""Which processes a run consists of: names, machines, command lines, environments, cores and GPUs. Pure: starts nothing.

The same plan is printed by a dry run, and carried out on one machine and on many.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.environment import PER_PROCESS, STARTED
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.generator_memory import CacheBudget
from megatron_async_rlhf.estimate.reward_memory import reward_cache
from megatron_async_rlhf.generator.vllm.server import bf16_problem, records_versions, server_command, server_environment
from megatron_async_rlhf.jobs.lifecycle import END_AT_ONCE
from megatron_async_rlhf.launch.layout import Slot, lay_out
from megatron_async_rlhf.launch.nodes import Node
from megatron_async_rlhf.models.classifier import read_classifier
from megatron_async_rlhf.run_secret import VARIABLE as SECRET_FILE
from megatron_async_rlhf.run_secret import secret_path
from megatron_async_rlhf.serving import reward_model_command
from megatron_async_rlhf.serving.vllm_command import server_url
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, SERVED_DIR

_NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
RESUME_FROM, SERVERS_STAYED = "--resume-from", "--servers-stayed"  # a controller's arguments


class ProcessSpec(Struct, frozen=True, kw_only=True):
    """One process. `environment` comes on top of ours (`child_environment`); empty `cores` means any core, empty `gpus`
    none.

    Attributes:
        node: which machine, counted from the first, which supervises.
        end_signal: ends it at once, when nothing is left to be saved.
        orphan_signal: comes when its supervisor has been killed, and nobody is left who would send another; None:
            `end_signal`.
        restarts: how often it may be started again once training has begun, if it dies or does nothing.
        restarts_key: of the configuration, that says so.
        blocks_terminate: neither it nor what it starts ever gets a SIGTERM: a scheduler sends that to all of a job, which
            still needs it to finish its step and save.
    """

    name: str
    arguments: list[str]
    environment: dict[str, str]
    cores: list[int]
    gpus: list[int] = []
    node: int = 0
    end_signal: int = signal.SIGTERM
    orphan_signal: int | None = None
    blocks_terminate: bool = False
    restarts: int = 0
    restarts_key: str = ""


class ProcessPlan(Struct, frozen=True, kw_only=True):
    """All processes, in starting order; the controller is the one that decides when the run is over.

    Attributes:
        on_request: generators that the controller asks for by these names, each set in the place of the one before.
        rewards: servers of reward models.
    """

    learners: list[ProcessSpec]
    generators: list[ProcessSpec]
    controller: ProcessSpec
    on_request: dict[str, list[ProcessSpec]] = {}
    rewards: list[ProcessSpec] = []

    @property
    def servers(self) -> list[ProcessSpec]:
        """Those without which a run can continue for a while."""
        return [*self.generators, *self.rewards]

    @property
    def processes(self) -> list[ProcessSpec]:
        return [*self.servers, *self.learners, self.controller]


def plan_processes(
    config: RunConfig,
    run_dir: Path,
    context_length: int,
    nodes: Sequence[Node],
    resume_from: int | None = None,
    *,
    budget: CacheBudget | None = None,
) -> ProcessPlan:
    """Learner ranks, generators, servers of reward models, and the controller, which is on the first machine.

    Args:
        resume_from: policy version of the checkpoint to continue from.
        budget: of a generator, as `generator_budget` gives it.

    Raises:
        ConfigError: the machines have too few GPUs, or this machine's vLLM cannot do what is configured.
    """
    in_flight = config.schedule.in_flight_updates
    if in_flight in ("keep", "recompute") and not records_versions():
        raise ConfigError(
            f"schedule.in_flight_updates = {in_flight} needs vLLM 0.30 or newer, which records the version of every "
            "token; set resubmit or none"
        )
    if config.run.device == "cpu" and config.generator.dtype == "bfloat16" and (problem := bf16_problem()):
        raise ConfigError(f"generator.dtype = bfloat16: {problem}")
    layout = lay_out(config, nodes, config.generator.replicas)
    rewards, reward_urls = plan_reward_servers(config, layout.rewards, nodes)
    sites = _sites(layout.generators, nodes)
    template = run_dir / POLICY_TEMPLATE_DIR
    commands = [server_command(config, template, site, context_length, budget) for site in sites]
    restarts = _Restarts("generator.restarts", config.generator.restarts if records_versions() else 0)
    generators = _generators(config, "generator", layout.generators, nodes, commands, restarts)
    addresses = [
        *("--learner", _commands_at(layout.learners, nodes)),
        *(argument for site in sites for argument in ("--generator", server_url(config, site))),
        *(argument for url in reward_urls for argument in ("--reward-server", url)),
        *("--transfer", "{}:{}".format(*_learner_address(layout.learners, nodes, 2))),
    ]
    return ProcessPlan(
        learners=_learners(config, run_dir, layout.learners, nodes),
        generators=generators,
        rewards=rewards,
        controller=_controller(config, run_dir, nodes, [*addresses, *_resumption(resume_from)], "train"),
    )


def plan_reward_servers(
    config: RunConfig, slots: Sequence[Sequence[Sequence[Slot]]], nodes: Sequence[Node]
) -> tuple[list[ProcessSpec], list[str]]:
    """The servers of all reward models that a run serves itself, and their addresses in the same order.

    Args:
        slots: of each worker, [models, replicas, tensor parallel].

    Raises:
        ConfigError: a model is not there.
    """
    specs: list[ProcessSpec] = []
    urls: list[str] = []
    for (key, section), replicas in zip(config.served_reward_models.items(), slots, strict=True):
        model = read_classifier(f"{key}.model", section.model)
        context, cache = section.context_length or model.context_length, reward_cache(config, section, model)
        for workers in replicas:
            home = nodes[workers[0].node]
            site = home.address, home.reward_ports[len(specs)]
            command = reward_model_command.server_command(section, config, site, context, cache)
            environment = reward_model_command.server_environment(section, config, _device_names(config, workers, home))
            restarts = _Restarts(f"{key}.restarts", section.restarts)
            specs.append(_server(config, f"reward.{len(specs)}", workers, home, command, environment, restarts))
            urls.append(server_url(config, site))
    return specs, urls


def plan_learner_alone(
    config: RunConfig,
    run_dir: Path,
    nodes: Sequence[Node],
    job: str,
    arguments: Sequence[str] = (),
    *,
    resume_from: int | None = None,
    learner_arguments: Sequence[str] = (),
) -> ProcessPlan:
    """The same without generators: learner ranks on all cores or GPUs, and that job as their controller."""
    slots = lay_out(config, nodes, replicas=0).learners
    addresses = ["--learner", _commands_at(slots, nodes), *arguments, *_resumption(resume_from)]
    return ProcessPlan(
        learners=_learners(config, run_dir, slots, nodes, learner_arguments),
        generators=[],
        controller=_controller(config, run_dir, nodes, addresses, job),
    )


def plan_reward_model(config: RunConfig, nodes: Sequence[Node]) -> ProcessPlan:
    """Of a learner of reward models."""
    run_dir = config.run.path.absolute()
    return plan_learner_alone(config, run_dir, nodes, "reward_model", learner_arguments=["--reward-model"])


def plan_evaluation(
    config: RunConfig, run_dir: Path, contexts: Mapping[str, int], nodes: Sequence[Node]
) -> ProcessPlan:
    """Servers of one model after the other, on the same slots and at the same addresses, without a learner; those of reward
    models are there all the time.

    Args:
        contexts: most tokens of a sequence, for each model by its name.

    Raises:
        ConfigError: the machines have too few GPUs.
    """
    layout = lay_out(config, nodes, config.generator.replicas, ranks=0)
    rewards, reward_urls = plan_reward_servers(config, layout.rewards, nodes)
    sites = _sites(layout.generators, nodes)
    never = _Restarts("", 0)  # what is answered stays, and the command can be given again
    servers = {}
    for name, context in contexts.items():
        directory = run_dir / SERVED_DIR / name
        commands = [server_command(config, directory, site, context, serves=name) for site in sites]
        servers[name] = _generators(config, name, layout.generators, nodes, commands, never)
    addresses = [
        *(argument for site in sites for argument in ("--generator", server_url(config, site))),
        *(argument for url in reward_urls for argument in ("--reward-server", url)),
    ]
    return ProcessPlan(
        learners=[],
        generators=[],
        rewards=rewards,
        controller=_controller(config, run_dir, nodes, addresses, "evaluate"),
        on_request=servers,
    )


def _sites(replicas: Sequence[Sequence[Slot]], nodes: Sequence[Node]) -> list[tuple[str, int]]:
    """Address and port of each generator."""
    homes = [nodes[slots[0].node] for slots in replicas]
    return [(home.address, home.generator_ports[i]) for i, home in enumerate(homes)]


def _generators(
    config: RunConfig,
    name: str,
    replicas: Sequence[Sequence[Slot]],
    nodes: Sequence[Node],
    commands: Sequence[list[str]],
    restarts: "_Restarts",
) -> list[ProcessSpec]:
    """Servers `name.0`, `name.1` ..., one for each command."""
    specs = []
    for i, (slots, command) in enumerate(zip(replicas, commands, strict=True)):
        home = nodes[slots[0].node]
        environment = server_environment(config, _device_names(config, slots, home))
        specs.append(_server(config, f"{name}.{i}", slots, home, command, environment, restarts))
    return specs


def _resumption(version: int | None) -> list[str]:
    return [] if version is None else [RESUME_FROM, str(version)]


def _controller(config: RunConfig, run_dir: Path, nodes: Sequence[Node], arguments: list[str], job: str) -> ProcessSpec:
    started = os.environ.get(STARTED) or f"{time.time():.0f}"  # a job of a cluster may have noted when it began
    command = [sys.executable, "-m", "megatron_async_rlhf.jobs", job, "--run-dir", str(run_dir), *arguments]
    return ProcessSpec(
        name="controller",
        arguments=command,
        # It may need a proxy, for W&B or a judge, but never to reach a machine of the run.
        environment=_environment(
            config, {"OMP_NUM_THREADS": "1", "no_proxy": ",".join(node.address for node in nodes), STARTED: started}
        ),
        cores=[],
        end_signal=END_AT_ONCE,
    )


class _Restarts(NamedTuple):
    """How often a server may be started again, and the key of the configuration that says so."""

    key: str
    limit: int


def _server(
    config: RunConfig,
    name: str,
    slots: Sequence[Slot],
    node: Node,
    arguments: list[str],
    environment: dict[str, str],
    restarts: _Restarts,
) -> ProcessSpec:
    """One vLLM server, on the machine of all its workers."""
    on_gpu = config.run.device == "cuda"
    return ProcessSpec(
        name=name,
        arguments=arguments,
        environment=_environment(config, environment | _network(config, node) | {"VLLM_HOST_IP": node.address}),
        # On CPUs workers are bound by vLLM or `WorkerInEngine`, and the front end may run wherever there is room.
        cores=_cores(config, slots, node) if on_gpu else [],
        gpus=[gpu for slot in slots for gpu in slot.devices] if on_gpu else [],
        node=slots[0].node,
        end_signal=signal.SIGINT,  # which vLLM takes as it takes a SIGTERM
        orphan_signal=signal.SIGKILL,  # without its engine an API server may wait for ever after a SIGINT
        blocks_terminate=True,
        restarts=restarts.limit,
        restarts_key=restarts.key,
    )


def _cores(config: RunConfig, slots: Sequence[Slot], node: Node) -> list[int]:
    """What a process on these slots is bound to; nothing if it may run anywhere."""
    devices = [device for slot in slots for device in slot.devices]
    if not config.launch.pin_cores:
        return []
    if config.run.device == "cpu":
        return devices
    near = [node.gpu_cores[gpu] for gpu in devices] if node.gpu_cores else []
    return sorted({core for cores in near for core in cores}) if all(near) else []


def _device_names(config: RunConfig, slots: Sequence[Slot], node: Node) -> list[str]:
    """As vLLM's environment names the GPU or the cores of each worker."""
    on_gpu = config.run.device == "cuda"
    return [",".join(node.gpus[device] if on_gpu else str(device) for device in slot.devices) for slot in slots]


def _learners(
    config: RunConfig, run_dir: Path, slots: Sequence[Slot], nodes: Sequence[Node], arguments: Sequence[str] = ()
) -> list[ProcessSpec]:
    """A rank for each slot. They meet where rank 0 is, which alone takes commands."""
    on_gpu = config.run.device == "cuda"
    # Kernels must start in the order they were queued, or communication does not overlap as Megatron plans it (it insists
    # for tensor and context parallelism up to Hopper). Then a kernel that waits for another holds up all behind it, of
    # any stream: `weights.send`, which runs beside the training, never queues such a one. A rank that shares no layer
    # with others has nothing to overlap, and its pushes need not stand behind its training.
    shares_layers = config.learner.world_size > config.learner.pipeline_parallel
    in_order = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if on_gpu and shares_layers else {}
    host, port = _learner_address(slots, nodes, 0)
    return [
        ProcessSpec(
            name=f"learner.{rank}",
            arguments=[
                *(sys.executable, "-m", "megatron_async_rlhf.learner.megatron.worker"),
                *("--run-dir", str(run_dir)),
                *("--listen", _commands_at(slots, nodes)),
                *arguments,
            ],
            environment=_environment(
                config,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(slot.devices[0] if on_gpu else rank),
                    "WORLD_SIZE": str(len(slots)),
                    "MASTER_ADDR": host,
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": str(
                        len(slot.devices) if config.launch.cores == "shared" else config.learner.threads
                    ),
                    **_network(config, nodes[slot.node]),
                    **in_order,
                },
            ),
            cores=_cores(config, [slot], nodes[slot.node]),
            gpus=list(slot.devices) if on_gpu else [],
            node=slot.node,
            end_signal=signal.SIGKILL,  # a SIGTERM it ignores: a scheduler sends that to all of a job
        )
        for rank, slot in enumerate(slots)
    ]


def _environment(config: RunConfig, own: dict[str, str]) -> dict[str, str]:
    """What a process needs, and what the configuration adds.

    Raises:
        ConfigError: both say something of one variable.
    """
    own = own | {SECRET_FILE: str(secret_path(config.run.path.absolute()))}
    for name in sorted(config.launch.environment.keys() & {*own, *PER_PROCESS}):
        raise ConfigError(f"launch.environment.{name} = {config.launch.environment[name]}: the run sets it itself")
    return config.launch.environment | own


def _network(config: RunConfig, node: Node) -> dict[str, str]:
    """Which interface gloo uses: left to itself it looks up the host name, which on many machines is a loopback one. NCCL
    chooses well as a rule; where the configuration names an interface it is told, unless the site or the user has.

    Servers and ranks talk to machines of the run alone, so they need no proxy.
    """
    told = {*os.environ, *config.launch.environment}
    names_it = config.launch.interface is not None and _NCCL_INTERFACE not in told
    nccl = {_NCCL_INTERFACE: f"={node.interface}"} if names_it else {}  # `=`: not what begins with it
    return {"GLOO_SOCKET_IFNAME": node.interface, "no_proxy": "*"} | nccl


def _commands_at(learners: Sequence[Slot], nodes: Sequence[Node]) -> str:
    return "tcp://{}:{}".format(*_learner_address(learners, nodes, 1))


def _learner_address(learners: Sequence[Slot], nodes: Sequence[Node], port: int) -> tuple[str, int]:
    """One of the ports of learner rank 0's machine: 0 rendezvous, 1 commands, 2 weight transfer."""
    node = nodes[learners[0].node]
    return node.address, node.ports[port]
