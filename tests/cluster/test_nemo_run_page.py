"""Every command and Python block of docs/nemo_run.md, with NeMo-Run; nothing trains, and no job is queued."""

import os
import subprocess
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, commands

PAGE = "docs/nemo_run.md"
SET_UP = (["bash", "tools/setup_launch_env.sh"], ["source", ".venv-launch/bin/activate"])  # has made the environment
COMMANDS = [words for words in commands(PAGE) if words not in SET_UP]
PYTHON = "\n".join(text for kind, text in blocks(PAGE) if kind == "python")
NEMO_TRAIN = [words[2:] for words in COMMANDS if words[:2] == ["nemo", "async-rlhf"]]
LAUNCH = [words for words in COMMANDS if words[0] == "async-rlhf"]
TRAINING = "-m megatron_async_rlhf train /dev/stdin"
LIMIT_S = 120


class NemoRun:
    """Commands in its environment. An interpreter and a Slurm stand in; `noted` is what they were called with."""

    def __init__(self, python: Path, directory: Path) -> None:
        self.directory, self.noted = directory, directory / "noted"
        (directory / "examples").symlink_to(ROOT / "examples")
        (directory / "run.yaml").symlink_to(ROOT / "examples/quickstart.yaml")
        self.trains = self._stand_in("trains", f'echo "$*" >>{self.noted}; cat >/dev/null')
        self._stand_in("sbatch", f'cat "${{@: -1}}" >>{self.noted}; echo 7')
        paths = os.pathsep.join([str(directory), str(python.parent), os.environ["PATH"]])
        self._keys = {"NEMORUN_HOME": f"{directory}/home", "PYTHONPATH": str(ROOT), "COLUMNS": "400", "PATH": paths}

    def __call__(self, *command: str) -> str:
        """What it printed."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=os.environ | self._keys,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def _stand_in(self, name: str, script: str) -> Path:
        path = self.directory / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path


@pytest.fixture
def nemo_run(launch_python: Path, tmp_path: Path) -> NemoRun:
    return NemoRun(launch_python, tmp_path)


def test_what_the_page_has():
    assert len(LAUNCH) == 4 and len(NEMO_TRAIN) == 2
    (other,) = [words for words in COMMANDS if words not in LAUNCH and words[2:] not in NEMO_TRAIN]
    assert other[:3] == ["nemo", "experiment", "logs"]


@pytest.mark.parametrize("words", LAUNCH, ids=" ".join)
def test_a_launch(nemo_run: NemoRun, words: list[str]):
    assert TRAINING in nemo_run(*words, *{"--dry-run"}.difference(words))


def test_nemo_runs_a_stage_here_and_shows_its_log(nemo_run: NemoRun):
    (words,) = [words for words in NEMO_TRAIN if "run.executor=local" in words]
    told = nemo_run("nemo", "async-rlhf", *words, f"python={nemo_run.trains}")
    assert nemo_run.noted.read_text() == f"{TRAINING}\n"
    (experiment,) = {word for word in told.split() if word.startswith("train_")}
    nemo_run("nemo", "experiment", "logs", experiment)


def test_nemo_submits_a_job(nemo_run: NemoRun):
    (words,) = [words for words in NEMO_TRAIN if "run.executor=slurm" in words]
    nemo_run("nemo", "async-rlhf", *words)
    job = nemo_run.noted.read_text().splitlines()
    for option in ("account=team", "nodes=2", "gpus-per-node=8", "time=12:00:00", "ntasks-per-node=1", "exclusive"):
        assert f"#SBATCH --{option}" in job
    assert "export ASYNC_RLHF_STARTED=$(date +%s)" in job
    (step,) = [line for line in job if line.startswith("srun --output ")]
    assert step.index("--kill-on-bad-exit=1") < step.index("--kill-on-bad-exit=0")  # NeMo-Run's, and ours, which counts


def test_the_python_blocks(nemo_run: NemoRun):
    """The second one continues from the imports of the first, with a configuration of one's own."""
    submitting = ("experiment.run(detach=True)", "experiment.run()")
    assert [PYTHON.count(each) for each in submitting] == [1, 1]
    program = PYTHON
    for each in submitting:
        program = program.replace(each, "experiment.dryrun()")
    shown = nemo_run("python", "-c", program)
    assert "#SBATCH --job-name=llama8b.train" in shown and "#SBATCH --job-name=llama8b.export" in shown
    assert "nemo_run.core.execution.docker.DockerExecutor" in shown
