"""`async-rlhf launch`: what it makes of a configuration, what NeMo-Run makes of that, and that it runs.

NeMo-Run is in an environment of its own (tools/setup_launch_env.sh): .venv-launch, or $ASYNC_RLHF_LAUNCH_ENV. A stand-in
for the interpreter that trains notes what it is called with; the slow test trains.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.cluster import SlurmKeys
from megatron_async_rlhf.config.load import check_tree, read_tree
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.job_script import job_script
from megatron_async_rlhf.launch.nemo import command
from megatron_async_rlhf.launch.recipe import RESUMABLE, load_recipe, stages_of
from megatron_async_rlhf.launch.stages import Stage, expand_stages

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/e2e/tiny.yaml"
# Notes node, arguments and standard input; $FAILS names commands that fail, unless they continue with an earlier start.
STAND_IN = """#!/usr/bin/env bash
echo "node ${SLURM_NODEID:-none}: $*" >>"$NOTES/calls"
[[ $4 != /dev/stdin ]] || cat >"$NOTES/$3.${SLURM_NODEID:-none}.yaml"
if [[ " $WAITS " == *" $3 "* ]]; then
    trap 'echo "stopped $3" >>"$NOTES/calls"; exit 130' TERM
    for _ in {1..600}; do sleep 0.1; done
fi
[[ " $FAILS " != *" $3 "* || " $* " == *" --resume "* ]]
"""


class Launching:
    """`async-rlhf launch` with NeMo-Run, in directories of its own; by default it starts stand-ins."""

    def __init__(self, python: Path, directory: Path) -> None:
        self.python, self.directory = python, directory
        self.home, self.run_dir = directory / "home", directory / "run"
        self.stand_in = directory / "python"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)

    def start(self, *arguments: str, python: str = "", **environment: str) -> subprocess.Popen[str]:
        command = [self.python, "-m", "megatron_async_rlhf", "launch", CONFIG, *arguments]
        command += ["--python", python or self.stand_in, "-s", f"run.dir={self.run_dir}"]
        keys = {"NEMORUN_HOME": str(self.home), "NOTES": str(self.directory), "PYTHONPATH": str(ROOT)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        keys = inherited | {"FAILS": "", "WAITS": "", "OMP_NUM_THREADS": "1"} | keys | environment
        return subprocess.Popen(
            command, env=keys, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.directory
        )

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> str:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == code, output
        return output

    @property
    def calls(self) -> list[str]:
        notes = self.directory / "calls"
        return notes.read_text().splitlines() if notes.exists() else []


@pytest.fixture
def launch(launch_python: Path, tmp_path: Path) -> Launching:
    return Launching(launch_python, tmp_path)


# --- what needs no NeMo-Run -----------------------------------------------------------------------------------------


def test_without_nemo_run_one_line_says_how_to_get_it():
    if importlib.util.find_spec("nemo_run") is not None:
        pytest.skip("NeMo-Run is installed in this environment")
    command = [sys.executable, "-m", "megatron_async_rlhf", "launch", CONFIG, "--executor", "local"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "bash tools/setup_launch_env.sh" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "learner.rank=2"], "learner.rank = 2: no such key"),
        (["--stages", "train,eval"], "there is no stage 'eval', only sft, train, export"),
        (["--stages", "sft", "-s", "warm_start.steps=0"], "warm_start.steps = 0"),
        (["--executor", "local", "--nodes", "2"], "launch.nodes = 2 with --executor local"),
        (["--executor", "local", "--account", "team"], "--account is for --executor slurm"),
        (["-s", "launch.slurm.time=soon"], "write hours:minutes:seconds"),
        (["--time", "soon"], "'soon' is no time"),
        (["--tunnel", "ssh", "--host", "login", "--user", "me"], "tunnel = ssh needs launch.slurm.job_dir"),
        (["--host", "login"], "host = login needs tunnel = ssh"),
        (["-s", "launch.slurm.environment={a b: c}"], "'a b' is no name of an environment variable"),
        (["--stages", "export", "--export-to", str(ROOT)], "exists; remove it, or choose another with --export-to"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(arguments: list[str], message: str):
    given = [] if "--executor" in arguments else ["--executor", "slurm"]
    result = CliRunner().invoke(app, ["launch", str(CONFIG), *given, *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception) and len(str(result.exception).splitlines()) == 1


def test_each_stage_starts_from_what_the_one_before_has_made(tmp_path: Path):
    tree = read_tree(CONFIG, ["run.name=a", "run.dir=runs/a", "launch.nodes=2"])
    sft, train, export = expand_stages(tree, ["sft", "train", "export"], directory=tmp_path)
    first, second = (check_tree(yaml.safe_load(stage.config)) for stage in (sft, train))
    assert (first.run.path, first.warm_start.steps, first.model.layers) == (Path("runs/a-sft"), 6, 2)
    assert (second.run.path, second.warm_start.steps) == (Path("runs/a"), 0)
    assert (second.model.hf, second.model.context_length) == (Path("runs/a-sft/checkpoints/final"), 96)
    assert export.arguments == ["export-hf", "runs/a", "runs/a-hf"]
    assert [stage.nodes for stage in (sft, train, export)] == [2, 2, 1]
    assert check_tree(tree).model.layers == 2  # as it was given


def test_what_is_left_of_a_recipe(tmp_path: Path, monkeypatch, capsys):
    """Looked for where the jobs write; a stage that read from one that is made anew is made anew, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(ROOT / "examples/mini", [])
    names = [stage.name for stage in recipe.stages]
    slurm = SlurmKeys(project_dir=tmp_path)
    for stage in recipe.stages:
        (tmp_path / stage.config.run.path).mkdir(parents=True)
        (tmp_path / stage.config.run.path / "summary.json").write_text('{"status": "completed"}')
    assert command._left(recipe, slurm) == []
    assert f"note: {names[0]}: " in capsys.readouterr().err
    assert [part.name for part in command._left(recipe, None)] == names
    (tmp_path / recipe.stages[0].config.run.path / "summary.json").unlink()
    readers = [stage.name for stage in recipe.stages if names[0] in stage.needs]
    left = [part.name for part in command._left(recipe, slurm)]
    assert left[0] == names[0] and set(readers) <= set(left)


def test_all_that_is_done_is_no_launch(monkeypatch):
    monkeypatch.setattr(command, "_left", lambda recipe, slurm: [])
    result = CliRunner().invoke(app, ["launch", str(ROOT / "examples/mini"), "--executor", "slurm", "--dry-run"])
    assert result.exit_code == 0 and "mini: all stages are completed" in result.output


def test_a_completed_sft_is_not_made_again(tmp_path: Path):
    tree = read_tree(CONFIG, ["run.dir=a"])
    (tmp_path / "a-sft").mkdir()
    for status, names in (("interrupted", ["sft", "train"]), ("completed", ["train"])):
        (tmp_path / "a-sft/summary.json").write_text(f'{{"status": "{status}"}}')
        stages = expand_stages(tree, ["sft", "train"], directory=tmp_path, resume=True)
        assert [stage.name for stage in stages] == names
        assert yaml.safe_load(stages[-1].config)["model"]["hf"] == "a-sft/checkpoints/final"
        assert all(stage.arguments[-1] == "--resume" for stage in stages)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("02:00:01", 7201), ("1-2", 93600), ("1-2:03", 93780), ("1-02:03:04", 93784)],
)
def test_a_time_is_what_slurm_takes_it_for(time: str, seconds: int):
    assert SlurmKeys(time=time).time_s == seconds


def test_stages_save_before_their_time_is_over(tmp_path: Path):
    tree = read_tree(CONFIG, ["launch.interrupt_grace_s=40"])
    for seconds, expected in ((None, None), (1000, 900), (60, 30)):
        for stage in expand_stages(tree, ["sft", "train"], directory=tmp_path, seconds=seconds):
            assert check_tree(yaml.safe_load(stage.config)).checkpoint.max_run_seconds == expected
            assert stage.resumes
    tree["checkpoint"] = {"max_run_seconds": 5}
    (train,) = expand_stages(tree, ["train"], directory=tmp_path, seconds=1000)
    assert check_tree(yaml.safe_load(train.config)).checkpoint.max_run_seconds == 5


def test_stages_of_a_recipe_end_in_time_and_go_on_with_what_there_is():
    recipe = load_recipe(ROOT / "examples/mini", ["rlhf.launch.interrupt_grace_s=40"])
    for seconds, expected in ((None, None), (1000, 900)):
        stages = {stage.name: stage for stage in stages_of(recipe, seconds)}
        configs = {name: check_tree(yaml.safe_load(stage.config)) for name, stage in stages.items()}
        assert configs["rlhf"].checkpoint.max_run_seconds == expected
        assert (configs["sft"].checkpoint.max_run_seconds is None) == (seconds is None)
        for name, stage in stages.items():
            assert (stage.arguments[-1] == "--resume") == (stage.arguments[0] in RESUMABLE), name


def test_the_script_hands_on_every_character_and_the_exit_code(tmp_path: Path):
    text = 'run:\n  name: it\'s "$HOME" `x` \\\\\n'
    stage = Stage(name="train", arguments=["train", "/dev/stdin", "a b"], config=text, resumes=True, result=tmp_path)
    program = tmp_path / "my python"
    program.write_text(
        f'#!/bin/bash\necho "$#" "$PWD" "$ODD" "${{@: -1}}" >"{tmp_path}/seen"\ncat >>"{tmp_path}/seen"\nexit 7\n'
    )
    program.chmod(0o755)
    script = job_script(
        stage, python=str(program), directory=str(tmp_path), environment={"ODD": "'$HOME'"}, setup=["ODD=$ODD!"]
    )
    for restarts, arguments in ({}, "5"), ({"SLURM_RESTART_COUNT": "2"}, "6"):
        done = subprocess.run(["bash", "-c", script], env=os.environ | restarts, timeout=60)
        seen = (tmp_path / "seen").read_text().splitlines()
        assert done.returncode == 7
        assert seen[0] == f"{arguments} {tmp_path} '$HOME'! {'--resume' if restarts else 'a b'}"
        assert "\n".join(seen[1:]) + "\n" == text


# --- what NeMo-Run makes of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2])
def test_dry_run_for_slurm(launch: Launching, nodes: int):
    shown = launch(
        "--executor", "slurm", "--dry-run", "--stages", "sft,train,export", "--nodes", str(nodes), "--account", "team",
        "--time", "12:30:00", "-s", "launch.slurm.cpus_per_node=8", "-s", "launch.slurm.sbatch={mail-type: FAIL}",
        "--name", "trial",
    )  # fmt: skip
    sft, train, export = re.split(r"^# (?:sft|train|export): sbatch --requeue --parsable ", shown, flags=re.M)[1:]
    assert train.startswith("--dependency=afterok:<job id of sft> ")
    assert export.startswith("--dependency=afterok:<job id of train> ")
    for line in (
        "#SBATCH --account=team", "#SBATCH --time=12:30:00", "#SBATCH --exclusive", "#SBATCH --mem=0",
        "#SBATCH --cpus-per-task=8", "#SBATCH --mail-type=FAIL", "#SBATCH --job-name=trial.train",
        f"#SBATCH --nodes={nodes}", "#SBATCH --ntasks-per-node=1", "unset SLURM_UNBUFFEREDIO",
    ):  # fmt: skip
        assert f"\n{line}\n" in train
    assert "#SBATCH --nodes=1\n" in export and "gpus-per-node" not in shown  # the run is on CPUs
    (step,) = re.findall(r"^srun --output .*", train, re.M)
    assert "--cpu-bind=none --cpus-per-task=8 bash " in step and step.endswith("/train/scripts/train.sh")
    assert (
        f"exec {launch.stand_in} -m megatron_async_rlhf train /dev/stdin ${{SLURM_RESTART_COUNT:+--resume}} <<" in train
    )
    assert f"hf: {launch.run_dir}-sft/checkpoints/final\n" in train and f"nodes: {nodes}\n" in train
    assert not launch.calls and not [path for path in launch.home.rglob("*") if path.is_file()]


def test_dry_run_for_gpus_in_a_container_over_ssh(launch: Launching):
    shown = launch(
        "--executor", "slurm", "--dry-run", "--tunnel", "ssh", "--host", "login", "--user", "me", "--job-dir", "/scratch/jobs",
        "--project-dir", "/project", "--container", "image.sqsh", "-s", "launch.slurm.container_mounts=[/data:/data]",
        "-s", "run.device=cuda", "-s", "weights.transport=nccl", "-s", "launch.gpus_per_node=4",
    )  # fmt: skip
    assert re.search(r"^# train: sbatch .*/scratch/jobs/run/run_\d+/train_sbatch.sh \(on login, as me\)$", shown, re.M)
    assert "#SBATCH --gpus-per-node=4\n" in shown
    assert re.search(
        r"^srun .*--container-image image.sqsh --container-mounts /project:/project,/data:/data,", shown, re.M
    )
    assert "\ncd -- /project || exit 1\n" in shown


def test_dry_run_on_this_machine(launch: Launching):
    shown = launch("--executor", "local", "--dry-run", "--stages", "train,export")
    assert re.search(r"^# train: bash .*/train/scripts/train.sh$", shown, re.M)
    assert re.search(r"^# export: bash .*/export/scripts/export.sh, if train has succeeded$", shown, re.M)
    assert f"-m megatron_async_rlhf export-hf {launch.run_dir} {launch.run_dir}-hf\n" in shown
    assert not launch.calls and not [path for path in launch.home.rglob("*") if path.is_file()]


def test_a_path_that_nemo_run_would_change_is_refused(launch: Launching):
    launch.home = launch.directory / "nemo_run"
    told = launch("--executor", "slurm", "--dry-run", code=2)
    assert told == f"error: {launch.home}: NeMo-Run replaces /nemo_run in every path by the job's directory; give the " \
        "directory another name, as by a symbolic link\n"  # fmt: skip


FOLLOW = """
import sys
from types import SimpleNamespace
import paramiko
from megatron_async_rlhf.launch.nemo import slurm_states

def lost():
    raise paramiko.SSHException("the session is not active")

answers = iter([
    lambda: "11|COMPLETED\\n12|RUNNING\\n",
    lost,                        # the connection
    lambda: sys.exit(1),         # the login
    lambda: "12|RUNNING\\n",     # MinJobAge after its end the first one is forgotten
    lambda: "12|COMPLETED\\n",
])

class Tunnel:
    def run(self, command, warn, timeout):
        if command.startswith("sacct"):
            return SimpleNamespace(ok=False, stdout="", stderr="Slurm accounting storage is disabled")
        return SimpleNamespace(ok=True, stdout=next(answers)(), stderr="")

slurm_states._POLL_S = 0
jobs = [slurm_states.QueuedJob(name=name, job_id=id, nodes=1, log="", tunnel=Tunnel()) for name, id in (("sft", "11"), ("train", "12"))]
print(slurm_states.follow(jobs, print))
"""


def test_jobs_are_followed_although_slurm_forgets_them_and_a_login_is_lost(launch_python: Path):
    command, paths = [launch_python, "-c", FOLLOW], {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == ["sft: completed", "train: running", "train: completed", "True"]


# --- that it runs ---------------------------------------------------------------------------------------------------


def test_stages_run_here_one_after_the_other(launch: Launching):
    told = launch("--executor", "local", "--stages", "sft,train,export")
    assert launch.calls == [
        "node none: -m megatron_async_rlhf sft /dev/stdin",
        "node none: -m megatron_async_rlhf train /dev/stdin",
        f"node none: -m megatron_async_rlhf export-hf {launch.run_dir} {launch.run_dir}-hf",
    ]
    assert [line for line in told.splitlines() if line.endswith("succeeded")] == [
        "sft: succeeded", "train: succeeded", "export: succeeded",
    ]  # fmt: skip


def test_after_a_stage_that_fails_no_other_runs_here(launch: Launching):
    told = launch("--executor", "local", "--stages", "sft,train", code=1, FAILS="sft")
    assert launch.calls == ["node none: -m megatron_async_rlhf sft /dev/stdin"]
    assert told.splitlines()[-1] == "sft: failed"


def test_an_interrupt_is_passed_on_and_ends_the_chain(launch: Launching):
    process = launch.start("--executor", "local", "--stages", "sft,train", WAITS="sft")
    deadline = time.monotonic() + 60
    while not (launch.directory / "sft.none.yaml").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=10)
        time.sleep(0.1)
    time.sleep(0.5)  # it sets its trap
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert launch.calls[-1] == "stopped sft" and output.splitlines()[-1] == "sft: interrupted"


@pytest.mark.slow
def test_a_real_chain_runs_here(launch: Launching):
    """Without generators, which take long to start."""
    launch("--executor", "local", "--stages", "sft,export", python=sys.executable)
    equal = [sys.executable, "-m", "megatron_async_rlhf", "verify-weights"]
    equal += [f"{launch.run_dir}-sft", f"{launch.run_dir}-hf"]
    told = subprocess.run(equal, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and told.stdout.startswith("equal: ")


def test_slurm_runs_stages_in_turn_on_all_nodes_and_again_after_a_failure(launch: Launching, slurm):
    told = launch(
        "--executor", "slurm", "--stages", "sft,train,export", "--nodes", "2", "-s", "launch.slurm.retries=1", "--wait",
        FAILS="train", **slurm.environment,
    )  # fmt: skip
    commands = [call.partition(": ")[2] for call in launch.calls]
    assert {call[:7] for call in launch.calls} == {"node 0:", "node 1:"}
    assert commands[:2] == ["-m megatron_async_rlhf sft /dev/stdin"] * 2
    assert commands[-3:-1] == ["-m megatron_async_rlhf train /dev/stdin --resume"] * 2
    assert commands[-1].startswith("-m megatron_async_rlhf export-hf ")
    assert told.splitlines()[-1] == "export: completed"
    configs = [yaml.safe_load((launch.directory / f"train.{node}.yaml").read_text()) for node in (0, 1)]
    assert configs[0] == configs[1] and check_tree(configs[0]).launch.nodes == 2


def test_slurm_starts_no_stage_after_one_that_fails(launch: Launching, slurm):
    told = launch(
        "--executor", "slurm", "--stages", "sft,train,export", "--wait", code=1, FAILS="sft", **slurm.environment
    )
    assert {call.partition(": ")[2] for call in launch.calls} == {"-m megatron_async_rlhf sft /dev/stdin"}
    assert {"sft: failed", "train: cancelled", "export: cancelled"} <= set(told.splitlines())


def test_what_sbatch_refuses_is_told_in_one_line(launch: Launching, slurm):
    told = launch("--executor", "slurm", "--partition", "none-such", code=1, **slurm.environment)
    assert re.fullmatch(r"error: sbatch failed: .*invalid partition.*; nothing was submitted\n", told)
