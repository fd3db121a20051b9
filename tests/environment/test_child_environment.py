"""What processes of a run get of the environment they are started in: the rule, each setting on its own, and refusals."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from settings import SETTINGS
from shells import TINY, settings, start

from megatron_async_rlhf import environment
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.environment import child_environment, environment_problems, ignored, ignored_line, is_ignored
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.launch.plan import ProcessPlan, ProcessSpec, plan_processes
from megatron_async_rlhf.launch.process import LocalProcess

CLEAN = {"PATH": "/usr/bin", "HOME": "/home/me", "USER": "me"}
SHOW = "import json, os, sys; print(json.dumps([dict(os.environ), sys.path, sys.flags.utf8_mode]))"


def plan(*overrides: str) -> ProcessPlan:
    config = load_config(TINY, ["run.dir=/runs/x", *overrides])
    return plan_processes(config, Path("/runs/x"), 96, planned_nodes(config))


def test_the_table_has_every_kind():
    assert len(SETTINGS) >= 40
    assert sum(not setting.passes for setting in SETTINGS.values()) >= 25


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_has_no_influence_or_describes_the_site(name: str):
    """It reaches no process, or all of them unless the plan says otherwise: what a process would do with it, it alone decides."""
    setting = SETTINGS[name]
    for process in plan().processes:
        clean, hostile = (child_environment(ours, process.environment) for ours in (CLEAN, CLEAN | setting.variables))
        passed = {name: setting.variables[name] for name in setting.passes if name not in process.environment}
        assert hostile == clean | passed
    assert {name for name in setting.variables if is_ignored(name)} == setting.variables.keys() - setting.passes
    told = {name for names in ignored(setting.variables).values() for name in names}
    assert told == setting.variables.keys() - setting.passes


def test_a_started_process_has_that_environment(tmp_path: Path, monkeypatch):
    for setting in SETTINGS.values():
        for variable, value in setting.variables.items():
            monkeypatch.setenv(variable, value)
    (tmp_path / "random.py").write_text("raise RuntimeError('the wrong one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = f"import random\n{SHOW}"
    spec = ProcessSpec(name="x", arguments=[sys.executable, "-c", program], environment={"VLLM_PORT": "1"}, cores=[])
    process = LocalProcess(spec, tmp_path, pipe_stdout=True)
    told = process.stdout.read()
    assert process._popen.wait() == 0, process.last_lines()
    seen, path, utf8 = json.loads(told)
    assert seen == child_environment(os.environ, {"VLLM_PORT": "1"} | process._scratch.environment)
    assert seen["VLLM_PORT"] == "1" and "VLLM_API_KEY" not in seen and seen["HF_TOKEN"] == "hf_x"
    assert utf8 == 1 and "" not in path and str(tmp_path) not in path


def test_machines_of_the_run_are_never_proxied():
    """The controller may need a proxy for others; servers and ranks talk to nobody else."""
    ours = CLEAN | {"http_proxy": "http://p:1", "NO_PROXY": "intra.net, 10.1.1.1"}
    processes = plan("launch.nodes=2", "run.device=cuda", "weights.transport=nccl", "launch.gpus_per_node=1").processes
    for process in processes:
        told = child_environment(ours, process.environment)
        assert told["http_proxy"] == "http://p:1" and told["no_proxy"] == told["NO_PROXY"]
        if process.name == "controller":
            assert told["no_proxy"] == "intra.net,10.1.1.1,node0,node1,localhost,127.0.0.1,::1"
        else:
            assert told["no_proxy"] == "*"
    assert child_environment(CLEAN | {"no_proxy": "*"}, {"no_proxy": "10.0.0.1"})["no_proxy"] == "*"


def test_what_is_meant_is_set_by_the_configuration():
    for process in plan("launch.environment={VLLM_LOGGING_LEVEL_: DEBUG, NCCL_ALGO: Ring, OMP_DYNAMIC: 1}").processes:
        told = child_environment(CLEAN | {"NCCL_ALGO": "Tree", "OMP_DYNAMIC": "0"}, process.environment)
        assert (told["VLLM_LOGGING_LEVEL_"], told["NCCL_ALGO"], told["OMP_DYNAMIC"]) == ("DEBUG", "Ring", "1")
    for name in ("VLLM_HOST_IP", "RANK", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TMPDIR"):
        with pytest.raises(ConfigError, match=f"launch.environment.{name} = 3: the run sets it itself"):
            plan(f"launch.environment={{{name}: 3}}")
    with pytest.raises(ConfigError, match="'A-B' is no name of an environment variable"):
        plan("launch.environment={A-B: x}")


def test_whom_the_system_does_not_know_gets_a_name_and_a_home(monkeypatch):
    """As users of OpenShift: torch asks for the name, and vLLM would make a directory called `~`."""
    monkeypatch.setattr(environment.pwd, "getpwuid", {}.__getitem__)
    told = child_environment({}, {})
    assert (told["USER"], told["HOME"]) == (str(os.getuid()), tempfile.gettempdir())
    told = child_environment({"USER": "me", "HOME": "/home/me"}, {})
    assert (told["USER"], told["HOME"]) == ("me", "/home/me")


COPY = """
import json, os, subprocess, sys
from megatron_async_rlhf.environment import child_environment
del sys.path[0]  # as `python -m megatron_async_rlhf` does
environment = child_environment(os.environ, {})
where = [sys.executable, "-c", "import megatron_async_rlhf; print(megatron_async_rlhf.__file__)"]
print(subprocess.run(where, env=environment, capture_output=True, text=True, check=True).stdout)
"""


def test_processes_are_of_the_copy_that_starts_them(tmp_path: Path):
    """A checkout in which `python -m megatron_async_rlhf` is called, where another copy is installed."""
    source = Path(environment.__file__).parent
    copy = tmp_path / "checkout" / source.name
    copy.mkdir(parents=True)
    for file in ("__init__.py", "environment.py"):
        (copy / file).write_bytes((source / file).read_bytes())
    started = subprocess.run(
        [sys.executable, "-c", COPY], cwd=copy.parent, env=os.environ | {"PYTHONPATH": str(source.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert started.stdout.strip() == str(copy / "__init__.py")
    assert child_environment(CLEAN, {}).get("PYTHONPATH") is None


def test_few_names_are_said_and_common_ones_are_not():
    assert (
        ignored_line(CLEAN | {"LANG": "C", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NCCL_DEBUG": "INFO"})
        is None
    )
    assert ignored_line({"VLLM_API_KEY": "secret", "LANG": "C"}) == (
        "VLLM_API_KEY: ignored; what is meant for this run belongs into launch.environment"
    )
    assert ignored_line({f"VLLM_{n}": "" for n in range(10)}).startswith("VLLM_0, VLLM_1, VLLM_2, VLLM_3, ")
    assert " and 2 more: ignored" in ignored_line({f"VLLM_{n}": "" for n in range(10)})
    of_a_pipeline = {"TMPDIR": "/tmp/x", "VLLM_RPC_BASE_PATH": "/tmp/x"}
    assert ignored_line(of_a_pipeline) is None
    assert ignored_line(of_a_pipeline | {"TMPDIR": "/tmp/y"}).startswith("VLLM_RPC_BASE_PATH: ignored")


def test_no_temporary_directory_at_all(monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(environment.tempfile, "gettempdir", nowhere)
    (line,) = environment_problems({})
    assert line.startswith("TMPDIR: there is no temporary directory that can be written")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("statistics.py", "would take the place of Python's own statistics; leave it out"),
        ("profile/__init__.py", "would take the place of Python's own profile; leave it out"),
        ("megatron/__init__.py", "would take the place of the megatron that is installed; leave it out, or uninstall"),
        ("tokenizers.so", "would take the place of the tokenizers that is installed"),
        ("test/__init__.py", None),
        ("datasets/train.jsonl", None),
        ("my_rewards.py", None),
    ],
)
def test_a_module_path_that_hides_what_a_run_needs(tmp_path: Path, made: str, said: str | None):
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).touch()
    found = environment_problems({"PYTHONPATH": f"{os.pathsep}{tmp_path}"})
    assert [said in line for line in found] == ([True] if said else [])
    assert all(line.startswith(f"PYTHONPATH = {tmp_path}: ") for line in found)


def test_it_is_refused_by_the_command(tmp_path: Path):
    (tmp_path / "wandb.py").touch()
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}")]
    refused = start(command, tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert refused.returncode == 2 and refused.stdout.count("\n") == 1
    assert "wandb.py would take the place of the wandb that is installed" in refused.stdout


def test_doctor_says_what_has_no_influence_and_what_is_refused(tmp_path: Path):
    """And looks at the machine although the configuration cannot run."""
    (tmp_path / "queue.py").touch()
    variables = {"VLLM_PORT": "tcp://10.0.0.7:8000", "WANDB_MODE": "offline"}
    told = start(["doctor", str(TINY), *settings("run.device=cuda")], tmp_path, variables).stdout
    assert "ok      environment: VLLM_PORT: without influence on a run (how vLLM works" in told
    assert "ok      environment: WANDB_MODE: without influence on a run (how W&B works" in told
    assert "open files" in told
    assert told.index("ok      torch: ") < told.index(
        "cannot  weights.transport = gloo does not go with run.device = cuda"
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_NODEID": "1"}, "launch.nodes = 1, but this is node rank 1 (--node-rank, or SLURM_NODEID)"),
        ({"SLURM_NODEID": "one"}, "SLURM_NODEID"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, "this Slurm step has 8 tasks"),
        ({"SLURM_STEP_NUM_TASKS": "8(x2)"}, "SLURM_STEP_NUM_TASKS = 8(x2)"),
    ],
)
def test_what_slurm_has_left_is_refused_by_name(tmp_path: Path, variables: dict[str, str], said: str):
    """In a shell without a terminal: in one with, it is the shell of a step."""
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}")]
    refused = start(command, tmp_path, variables, prepare=os.setsid)
    assert refused.returncode == 2 and said in refused.stdout and "Traceback" not in refused.stdout
    assert not (tmp_path / "run").exists()
