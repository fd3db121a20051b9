"""The jobs of slurm/ on a real Slurm: two nodes, a learner rank on each, a generator on the second."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_tree import command_line, descendants

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "slurm").glob("*.sh"))
LIMIT_S = 280
# What is measured differs from start to start; all else must not.
MEASURED = ("time", "tokens_per_s")


class Job:
    """`sbatch slurm/cpu_smoke.sh` with a run directory of its own."""

    def __init__(self, slurm, name: str, *settings: str, options: tuple[str, ...] = ()) -> None:
        self.slurm, self.directory = slurm, slurm.directory / name
        variables = [f"RUN_DIR={self.directory}", f"VENV={sys.prefix}", "DOCTOR=0", "OMP_NUM_THREADS=1"]
        output = f"--output={slurm.directory}/job-%j.log"
        arguments = [word for setting in settings for word in ("-s", setting)]
        submit = ["sbatch", "--parsable", f"--chdir={ROOT}", output, *options, "slurm/cpu_smoke.sh", *arguments]
        self.id = int(slurm.run("env", f"--chdir={ROOT}", *variables, *submit))

    def log(self) -> str:
        return self.slurm.job_log(self.id)

    def wait(self, *states: str) -> str:
        return self.slurm.wait(self.id, set(states), LIMIT_S)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(self.lines()) < step:
            assert time.monotonic() < deadline and self.slurm.state(self.id) in ("PENDING", "RUNNING"), self.log()
            time.sleep(0.2)

    def lines(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    def processes(self) -> list[int]:
        """Of this run, on all nodes, as their command lines name its directory or their parents' do."""
        found = subprocess.run(["pgrep", "-f", str(self.directory)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def generator_processes(self) -> list[int]:
        """Its API server, its engine and a worker: all but Python's tracker of resources, which ignores SIGTERM."""
        server = json.loads((self.directory / "logs/processes.json").read_text())["generator.0"]
        return [pid for pid in descendants(server) if "resource_tracker" not in command_line(pid)]

    def seconds_until_gone(self) -> float:
        start = time.monotonic()
        while self.processes() and time.monotonic() - start < LIMIT_S:
            time.sleep(0.1)
        return time.monotonic() - start


def blocks_terminate(pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_over_two_nodes(slurm):
    """Asked to save, as --signal does when the time limit is near, it goes back into the queue and on; then it is cancelled,
    which tells every process of it to end: the step under way is finished and saved all the same."""
    job = Job(slurm, "one", "schedule.mode=sync", "schedule.steps=100000", "checkpoint.every_steps=1000")
    job.wait_for_step(1)
    slurm.run("scancel", "--batch", "--signal=TERM", str(job.id))
    job.wait("PENDING")
    made = len(job.lines())
    job.wait_for_step(made + 3)
    assert "back into the queue" in job.log() and "start 2" in job.log() and "continuing from" in job.log()
    server = job.generator_processes()
    assert len(server) == 2 and all(blocks_terminate(pid) for pid in server)
    slurm.run("scancel", str(job.id))
    assert job.seconds_until_gone() < 30
    job.wait("CANCELLED", "COMPLETING")
    assert_interrupted_and_saved(job)
    assert [line["step"] for line in job.lines()] == list(range(1, job.summary()["steps"] + 1))


def assert_interrupted_and_saved(job: Job) -> None:
    summary = job.summary()
    assert (summary["status"], summary["error"]) == ("interrupted", None), job.log()
    assert (job.directory / f"checkpoints/step_{summary['steps']:06d}/metadata.json").is_file()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_jobs_at_once(slurm):
    """Three of one user on the same nodes: one completes; one is asked to save and goes back into the queue, with the
    first one's result in the end; one is cancelled."""
    steps = ("schedule.mode=sync", "schedule.steps=40", "checkpoint.every_steps=15")
    cut, whole = Job(slurm, "cut", *steps), Job(slurm, "whole", *steps)
    cancelled = Job(slurm, "cancelled", "schedule.steps=100000")

    cut.wait_for_step(1)  # at once: it has few steps
    slurm.run("scancel", "--batch", "--signal=TERM", str(cut.id))

    cancelled.wait_for_step(3)
    slurm.run("scancel", str(cancelled.id))
    assert cancelled.seconds_until_gone() < 30
    cancelled.wait("CANCELLED", "COMPLETING")
    assert_interrupted_and_saved(cancelled)
    whole.wait("COMPLETED")
    cut.wait("COMPLETED")
    assert "back into the queue" in cut.log() and "start 2" in cut.log() and "continuing from" in cut.log()
    summaries = [job.summary() for job in (whole, cut)]
    for job, summary in zip((whole, cut), summaries, strict=True):
        assert (summary["status"], summary["steps"]) == ("completed", 40), job.log()
        assert summary["weight_sync"]["mismatches"] == 0 < summary["weight_sync"]["verified"]
        assert [line["step"] for line in job.lines()] == list(range(1, 41))
    assert summaries[0]["eval"] == summaries[1]["eval"]
    for one, other in zip(whole.lines(), cut.lines(), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(MEASURED)} == {
            k: v for k, v in other.items() if not k.startswith(MEASURED)
        }
    command = [sys.executable, "-m", "megatron_async_rlhf", "verify-weights", str(whole.directory), str(cut.directory)]
    equal = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert equal.returncode == 0, equal.stdout + equal.stderr


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_lost_node_ends_the_job_and_its_return_goes_on_with_it(slurm):
    job = Job(slurm, "lost", "schedule.steps=100000", "checkpoint.every_steps=20")
    job.wait_for_step(50)
    pid = int((slurm.directory / "testbed/n2.pid").read_text())
    os.kill(pid, 9)  # slurmd alone: what it started lives on, and nobody tells it to end but its own first machine
    while slurm.state(job.id) == "RUNNING":  # Slurm takes its SlurmdTimeout to notice
        time.sleep(0.1)
    assert job.seconds_until_gone() < 30
    assert job.summary()["status"] == "interrupted"
    made = len(job.lines())
    slurm.start()
    job.wait("RUNNING")
    job.wait_for_step(made + 1)
    assert "continuing from" in job.log()
    slurm.run("scancel", str(job.id))
    assert job.seconds_until_gone() < 30


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_time_limit_of_a_minute(slurm):
    """Too little for the steps asked for, enough to make some: with nothing else on the machine."""
    steps = ("schedule.mode=sync", "schedule.steps=150")
    whole = Job(slurm, "unlimited", *steps)
    whole.wait("COMPLETED")
    cut = Job(slurm, "limited", *steps, options=("--time=1",))
    cut.wait("COMPLETED")
    assert "back into the queue" in cut.log()
    assert whole.summary()["eval"] == cut.summary()["eval"]


SMALL_STAGES = {
    "pipeline.yaml": """
name: small
stages:
  - {name: sft, command: sft, config: sft.yaml}
  - {name: more, command: sft, config: more.yaml, set: {model.hf: "{sft}/checkpoints/final"}}
""",
    "sft.yaml": """
model: {layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96, tokenizer: bytes}
data: {train: builtin, train_prompts: 256, eval_prompts: 16}
sft: {steps: 400, batch_size: 32}
""",
    "more.yaml": "data: {train: builtin, train_prompts: 64, eval_prompts: 16}\nsft: {steps: 4, batch_size: 8}\n",
    "job.sh": """#!/usr/bin/env bash
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
command=pipeline config=$RECIPE looked_at=$RECIPE/sft.yaml lead=20
overrides() { :; }
source slurm/job.sh
""",
}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_pipelines_job_goes_on_with_the_stage_that_was_cut_off(slurm):
    """As slurm/llama8b_pipeline.sh, with two stages on a CPU: asked to save, it goes back into the queue."""
    recipe, run = slurm.directory / "recipe", slurm.directory / "pipeline"
    recipe.mkdir()
    for name, text in SMALL_STAGES.items():
        (recipe / name).write_text(text)
    variables = [f"RECIPE={recipe}", f"RUN_DIR={run}", f"VENV={sys.prefix}", "DOCTOR=0", "OMP_NUM_THREADS=1"]
    output = [f"--output={slurm.directory}/job-%j.log", "--open-mode=append", "--requeue"]
    submit = ["sbatch", "--parsable", f"--chdir={ROOT}", *output, str(recipe / "job.sh")]
    job = int(slurm.run("env", f"--chdir={ROOT}", *variables, *submit))
    metrics, deadline = run / "sft/metrics.jsonl", time.monotonic() + LIMIT_S
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and slurm.state(job) in ("PENDING", "RUNNING"), slurm.job_log(job)
        time.sleep(0.2)
    slurm.run("scancel", "--batch", "--signal=TERM", str(job))
    slurm.wait(job, "PENDING", LIMIT_S)
    assert "sft: interrupted" in slurm.job_log(job) and "back into the queue" in slurm.job_log(job)
    slurm.wait(job, "COMPLETED", LIMIT_S)
    record = json.loads((run / "pipeline.json").read_text())
    assert [record[name]["status"] for name in ("sft", "more")] == ["completed"] * 2, slurm.job_log(job)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401)), "it did not begin anew"


@pytest.mark.parametrize(
    ("job", "nodes", "partition"),
    [
        *((mode, *place) for mode in ("async", "sync") for place in ((1, "main"), (2, "main"), (4, "big"))),
        ("pipeline", 1, "main"),
    ],
)
def test_slurm_accepts_the_gpu_jobs(slurm, job: str, nodes: int, partition: str):
    script = str(ROOT / f"slurm/llama8b_{job}.sh")
    slurm.run("sbatch", "--test-only", f"--nodes={nodes}", f"--partition={partition}", script)


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["launch.nodes=3"], "launch.nodes = 3, but this Slurm step has 2 nodes; ask for 3 (sbatch --nodes)"),
        (["learner.ranks=3"], "learner.ranks = 3"),
        (["run.device=cuda", "weights.transport=nccl"], "torch sees no GPU here"),
        (["model={hf: nowhere}"], "nowhere"),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(slurm, settings: list[str], says: str):
    job = Job(slurm, f"refused-{abs(hash(says))}", *settings)
    job.wait("FAILED")
    lines = [line for line in job.log().splitlines() if line.startswith("error: ")]
    assert lines and says in lines[0], job.log()
    if settings[0].startswith("model"):  # the first machine alone looks for it
        assert len(lines) == 1 and job.log().count("the first machine, n1, has ended") == 1, job.log()
    assert not job.directory.exists()


def test_a_job_outside_slurm_says_how_to_submit_it():
    told = subprocess.run(
        ["bash", "slurm/cpu_smoke.sh"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2 and told.stderr.startswith("error: submit it: sbatch slurm/cpu_smoke.sh")


# --- the script alone, with stand-ins for Slurm's commands ----------------------------------------------------------

STAND_INS = {
    "srun": """
echo "$*" >>"$NOTES/srun"
case $* in *" doctor "*) exit ;; esac
mkdir -p "$RUN_DIR" && touch "$RUN_DIR/config.yaml" "$RUN_DIR/pipeline.json"
echo $$ >"$NOTES/pid.partial" && mv "$NOTES/pid.partial" "$NOTES/pid"
until [ -e "$NOTES/end" ]; do
    if [ -e "$RUN_DIR/stop" ]; then rm "$RUN_DIR/stop" && echo >>"$NOTES/stops"; fi
    sleep 0.02
done
if [ -n "$OWN_CODE" ]; then mkdir -p "$RUN_DIR/logs" && echo "$OWN_CODE" >"$RUN_DIR/logs/exit_code"; fi
exit "${CODE:-3}"
""",
    "squeue": """
case $* in
    *EndTime*) date -d "${ENDS:-now}" +%FT%T ;;
    *PreemptTime*) echo "${PREEMPTED:-N/A}" ;;
    *State*)
        echo >>"$NOTES/signals"
        if [ -n "$BUSY" ] && [ ! -e "$NOTES/busy" ]; then touch "$NOTES/busy"; exit 1; fi
        if [ -n "$ENDS_MEANWHILE" ]; then
            touch "$NOTES/end"
            while [ -e "/proc/$(cat "$NOTES/pid")/exe" ]; do sleep 0.02; done
        fi
        echo RUNNING ;;
esac
""",
    "sleep": """
exec /bin/sleep 0.02
""",
    "scontrol": """
case $* in
    "show config") echo "SlurmdTimeout           = 0 sec" ;;
    *)
        echo "$*" >>"$NOTES/scontrol"
        if [ -n "$BUSY" ] && [ ! -e "$NOTES/busier" ]; then touch "$NOTES/busier"; exit 1; fi ;;
esac
""",
}


class Script:
    """A script of slurm/ as a job would run it, until it is told to end."""

    def __init__(
        self, directory: Path, *arguments: str, script: str = "cpu_smoke", nodes: int = 2, **environment: str
    ) -> None:
        self.notes, commands = directory / "notes", directory / "commands"
        for path in (self.notes, commands):
            path.mkdir()
        for name, text in STAND_INS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (commands / name).chmod(0o755)
        variables = {"PATH": f"{commands}:{os.environ['PATH']}", "VENV": sys.prefix, "NOTES": str(self.notes)}
        variables |= {"RUN_DIR": str(directory / "run"), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"}
        variables |= {
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "ENDS_MEANWHILE": "",
            "BUSY": "",
            "OWN_CODE": "",
        } | environment
        self.process = subprocess.Popen(
            ["bash", f"slurm/{script}.sh", *arguments],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, note: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not (self.notes / note).exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, said


def test_a_job_asks_its_run_once_to_save(tmp_path: Path):
    script = Script(tmp_path)
    script.wait_for("pid")
    script.process.terminate()
    script.wait_for("stops")
    script.process.terminate()
    (script.notes / "end").touch()
    assert script.ended()[0] == 3
    assert (script.notes / "signals").read_text() == (script.notes / "stops").read_text() == "\n"
    doctor, train = (script.notes / "srun").read_text().splitlines()
    assert " doctor " in doctor and " train " in train
    assert [word for word in doctor.split() if word.startswith("--wait=")][-1] == "--wait=0"
    assert [word for word in train.split() if word.startswith("--wait=")] == ["--wait=60"]
    assert all(" --kill-on-bad-exit=0 " in step for step in (doctor, train))


def test_a_run_that_ends_while_its_job_answers_a_signal_keeps_its_exit_code(tmp_path: Path):
    script = Script(tmp_path, ENDS_MEANWHILE="yes")
    script.wait_for("pid")
    script.process.terminate()
    assert script.ended()[0] == 3


def made_a_step(directory: Path) -> None:
    (directory / "run/checkpoints/step_000002").mkdir(parents=True)


def test_a_busy_slurm_is_asked_again(tmp_path: Path):
    script = Script(tmp_path, CODE="130", BUSY="yes")
    script.wait_for("pid")
    script.process.terminate()
    script.wait_for("stops")
    made_a_step(tmp_path)
    (script.notes / "end").touch()
    assert script.ended()[0] == 130
    assert (script.notes / "signals").read_text() == "\n\n"
    assert (script.notes / "scontrol").read_text() == "requeue 7\n" * 2


@pytest.mark.parametrize(("preempted", "requeues"), [("2026-11-29T12:00:00", True), ("N/A", False)])
@pytest.mark.parametrize(("code", "has_made"), [("130", True), ("130", False), ("143", False)])
def test_a_run_that_slurm_preempts_with_a_time_of_grace_comes_back(
    tmp_path: Path, preempted: str, requeues: bool, code: str, has_made: bool
):
    """Also if it was only starting, with nothing to save, or not even told what to do when asked to end."""
    script = Script(tmp_path, CODE=code, PREEMPTED=preempted)
    script.wait_for("pid")
    if has_made:
        made_a_step(tmp_path)
    (script.notes / "end").touch()
    assert script.ended()[0] == int(code)
    assert (script.notes / "scontrol").exists() == requeues


@pytest.mark.parametrize(
    ("restarts", "has_made", "requeues"), [("0", False, True), ("3", True, True), ("3", False, False)]
)
@pytest.mark.parametrize("code", [{"CODE": "75"}, {"CODE": "137", "OWN_CODE": "75"}])
def test_a_job_that_lost_a_machine_comes_back(tmp_path: Path, restarts: str, has_made: bool, requeues: bool, code):
    """Of a task that was killed srun says so, whatever the first one said."""
    script = Script(tmp_path, SLURM_RESTART_COUNT=restarts, **code)
    script.wait_for("pid")
    if has_made:
        made_a_step(tmp_path)
    (script.notes / "end").touch()
    code, said = script.ended()
    assert (code, "a machine was lost" in said) == (75, requeues), said
    assert (script.notes / "scontrol").exists() == requeues


@pytest.mark.parametrize(
    ("made", "code", "says"),
    [
        ("rlhf/checkpoints/step_000065/metadata.json", 130, "back into the queue"),
        ("sft/checkpoints/final/config.json", 130, "back into the queue"),
        ("eval/progress/policy.jsonl", 130, "back into the queue"),
        ("rlhf/logs/controller.log", 1, "error: no step was made before the time limit"),
    ],
)
def test_a_pipelines_job_goes_back_into_the_queue_with_what_its_stages_made(
    tmp_path: Path, made: str, code: int, says: str
):
    script = Script(tmp_path, "-s", "sft.run.seed=3", script="llama8b_pipeline", nodes=1, CODE="130")
    script.wait_for("pid")
    path = tmp_path / "run" / made
    path.parent.mkdir(parents=True)
    path.touch()
    script.process.terminate()
    script.wait_for("stops")
    (script.notes / "end").touch()
    ended, said = script.ended()
    assert (ended, says in said) == (code, True), said
    assert (script.notes / "scontrol").exists() == (code == 130)
    doctor, pipeline = (script.notes / "srun").read_text().splitlines()
    assert doctor.endswith(" doctor examples/llama3.1-8b_no_robots/rlhf.yaml")
    assert " pipeline examples/llama3.1-8b_no_robots -s sft.launch.interrupt_grace_s=500 " in pipeline
    assert pipeline.endswith(f" -s dir={tmp_path / 'run'} -s sft.run.seed=3") and "--resume" not in pipeline


@pytest.mark.parametrize(("ends", "requeues"), [("1 minute", False), ("3 hours", True)])
def test_a_job_that_was_asked_before_its_first_step_comes_back_unless_its_time_is_up(
    tmp_path: Path, ends: str, requeues: bool
):
    script = Script(tmp_path, CODE="130", ENDS=ends)
    script.wait_for("pid")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/config.yaml").touch()
    script.process.terminate()
    script.wait_for("stops")
    (script.notes / "end").touch()
    code, said = script.ended()
    assert (code, "raise --time" in said) == (130 if requeues else 1, not requeues), said
    assert (script.notes / "scontrol").exists() == requeues


@pytest.mark.parametrize(
    "arguments", [["-s", "run.dir=a"], ["-srun.dir=a"], ["--set=run.dir=a"], ["--set", "run.dir=a"]]
)
def test_the_directory_of_a_job_is_set_where_the_job_sees_it(tmp_path: Path, arguments: list[str]):
    script = Script(tmp_path, *arguments)
    (script.notes / "end").touch()
    code, said = script.ended()
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "RUN_DIR=runs/trial sbatch ..." in said
