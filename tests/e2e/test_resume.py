"""Real runs that are interrupted in every way and continue; the fewest starts of vLLM that show it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from wandb_records import rows, run_ids

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.file_digests import check_digests
from megatron_async_rlhf.formats.reader import TorchDistReader
from megatron_async_rlhf.launch.going_back import newest_whole

SYNC = ("schedule.mode=sync", "checkpoint.every_steps=2", "checkpoint.keep_last=null")
PER_STEP = 8 * 3  # samples


def command(*arguments: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "megatron_async_rlhf", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


def without_times(lines: list[dict]) -> list[dict]:
    measured = ("time", "tokens_per_s", "model_flops_utilisation")
    return [{key: line[key] for key in line if not key.startswith(measured)} for line in lines]


def assert_same_tensors(a: Path, b: Path) -> None:
    """Weights and optimizer state of two checkpoints, bit for bit."""
    ours, theirs = TorchDistReader(a), TorchDistReader(b)
    assert set(ours.tensors) == set(theirs.tensors)
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in ours.tensors)
    for key, entry in ours.tensors.items():
        layers = range(entry.size[0]) if ".layers." in key else [None]
        for layer in layers:
            rows, cols = (*entry.size[layer is not None :], 1)[:2]
            values = [torch.empty(rows, cols) for _ in range(2)]
            for reader, value in zip((ours, theirs), values, strict=True):
                reader.read_into(value, key, layer, 0, 0)
            assert torch.equal(*values), key


def cut_at(run: Path, version: int, copy: Path, **schedule: object) -> Path:
    """A copy of a completed run as it would be had it died some time after a checkpoint."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name not in ("reference", f"step_{version:06d}"):
            shutil.rmtree(path)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"status": "failed"}))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # it died while it wrote this
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["schedule"] |= schedule
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


def assert_same_run(ours, theirs) -> None:
    assert without_times(ours.lines("metrics.jsonl")) == without_times(theirs.lines("metrics.jsonl"))
    for file in ("samples.jsonl", "evaluations.jsonl"):
        assert ours.lines(file) == theirs.lines(file), file
    summaries = [run.summary() for run in (ours, theirs)]
    for key in (
        "status",
        "steps",
        "samples_generated",
        "samples_trained",
        "tokens_trained",
        "staleness",
        "logprob_gap",
        "eval",
    ):
        assert summaries[0][key] == summaries[1][key], key
    for key in ("count", "bytes", "bytes_minimum", "verified", "mismatches"):
        assert summaries[0]["weight_sync"][key] == summaries[1]["weight_sync"][key], key
    assert_same_tensors(*(run.directory / "checkpoints/step_000004" for run in (ours, theirs)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_and_half_is_the_whole_bit_for_bit(start, tmp_path):
    whole = start(*SYNC)
    output = whole.wait()
    assert whole.process.returncode == 0, output
    places = whole.directory / "checkpoints"
    assert sorted(path.name for path in places.iterdir()) == ["final", "reference", "step_000002", "step_000004"]
    assert_weights_are_usable(whole.directory, tmp_path)
    assert_every_damage_is_found(shutil.copytree(whole.directory, tmp_path / "damaged"))

    halves = [
        (cut_at(whole.directory, 2, tmp_path / "sync"), SYNC),
        # The same schedule by another name: the run whose second half this is could have been either.
        (
            cut_at(whole.directory, 2, tmp_path / "async", mode="async", max_staleness=0),
            ("schedule.mode=async", "schedule.max_staleness=0", *SYNC[1:]),
        ),
    ]
    if os.environ.get("ASYNC_RLHF_TEST_THOROUGH") != "1":
        del halves[1]
    for directory, overrides in halves:
        rest = start(*overrides, resume=directory)
        output = rest.wait()
        assert rest.process.returncode == 0, output
        assert f"continuing from {directory / 'checkpoints/step_000002'}" in output
        assert_same_run(rest, whole)
        equal = command("verify-weights", directory, whole.directory)
        assert equal.returncode == 0, equal.stdout + equal.stderr


@pytest.mark.thorough  # the next one does it more often, tests/launch/test_supervisor.py without servers
@pytest.mark.timeout(600)
def test_a_learner_that_is_killed_costs_nothing_but_time(start):
    whole = start(*SYNC)
    output = whole.wait()
    assert whole.process.returncode == 0, output
    killed = start(*SYNC)
    killed.wait_for_step(3)
    assert_strangers_are_refused(killed)
    generator = killed.pid("generator.0")
    killed.kill("learner.0")
    output = killed.wait()
    assert killed.process.returncode == 0, output
    assert re.search(
        r"learner\.0 was killed by SIGKILL.*; continuing from step [24] \(run\.max_restarts: 1 of 3\)", output
    )
    assert killed.pid("generator.0") == generator
    assert_same_run(killed, whole)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_learner_that_is_killed_twenty_times(start):
    """At random moments, either rank; generators stay up, and nothing differs in the end."""
    kills, dice = 20, random.Random(0)
    long = (*SYNC, "schedule.steps=200", "learner.ranks=2", "learner.tensor_parallel=2", "generator.replicas=2")
    whole = start(*long)
    output = whole.wait()
    assert whole.process.returncode == 0, output
    killed = start(*long, f"run.max_restarts={kills}")
    killed.wait_for_step(3)
    generators = [killed.pid(f"generator.{i}") for i in range(2)]
    for number in range(kills):
        before = {rank: killed.pid(f"learner.{rank}") for rank in range(2)}
        time.sleep(dice.random() * 3)
        assert killed.process.poll() is None, killed.process.stdout.read()
        killed.kill(f"learner.{dice.randrange(2)}")
        for rank, pid in before.items():
            killed.wait_for_another(f"learner.{rank}", pid)
        if number % 2:  # sometimes it gets on
            killed.wait_for_step(len(killed.lines("metrics.jsonl")) + 1)
    output = killed.wait()
    assert killed.process.returncode == 0, output
    assert f"(run.max_restarts: {kills} of {kills})" in output
    assert [killed.pid(f"generator.{i}") for i in range(2)] == generators
    assert_same_run(killed, whole)


def assert_strangers_are_refused(run) -> None:
    """A generator answers who shows the run's secret, which stands in nothing that others see."""
    port = argument_of(run.pid("generator.0"), "--port")
    secret = (run.directory / ".secret").read_text()
    for path in ("/health", "/v1/models", "/async_rlhf/pause?how=abort", "/collective_rpc", "/metrics"):
        for shown in ({}, {"Authorization": f"Bearer {secret[:-1]}"}):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=shown)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=10)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {secret}"})
    assert urllib.request.urlopen(request, timeout=10).status == 200
    for name in ("controller", "learner.0", "generator.0"):
        for file in ("cmdline", "environ"):
            assert secret.encode() not in Path(f"/proc/{run.pid(name)}/{file}").read_bytes()
    for path in run.directory.rglob("*"):
        if path.is_file() and path.name != ".secret":
            assert secret.encode() not in path.read_bytes(), path


def argument_of(pid: int, option: str) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index(option) + 1]


def assert_every_damage_is_found(run: Path) -> None:
    """1,000 flipped bits and lost ends, over all files of the newest checkpoint; none is continued from."""
    dice, newest = random.Random(0), run / "checkpoints/step_000004"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    assert {"__0_0.distcp", "run_state.msgpack", "digests.json", "config.json"} <= {path.name for path in files}
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        place = dice.randrange(len(content))
        if dice.random() < 0.25:
            os.truncate(path, place)
        else:
            flipped = content[place] ^ 1 << dice.randrange(8)
            path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=str(newest)):
            check_digests(newest)
        if number < len(files):  # once for each
            assert newest_whole(run) == 2, path
        if number == 0:
            refused = command("train", run, "--resume", "-s", f"run.dir={run}", "-s", "schedule.steps=6")
            assert refused.returncode == 2 and f"delete {newest} to continue from step 2" in refused.stderr, (
                refused.stderr
            )
        path.write_bytes(content)
    check_digests(newest)


def assert_weights_are_usable(run: Path, tmp_path: Path) -> None:
    """A checkpoint is a policy for every command, and the newest one is the last policy of a run that is not completed."""
    checkpoint = run / "checkpoints/step_000004"
    equal = command("verify-weights", checkpoint, run)
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert command("verify-weights", run / "checkpoints/step_000002", run).returncode == 1
    cut = cut_at(run, 2, tmp_path / "cut")
    assert command("export-hf", cut, tmp_path / "exported").returncode == 0
    assert command("verify-weights", tmp_path / "exported", run / "checkpoints/step_000002").returncode == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    plan = command("train", Path(__file__).with_name("policy.yaml"), "--dry-run", "-s", f"model.hf={checkpoint}")
    assert plan.returncode == 0, plan.stderr


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_killed_during_a_save_then_interrupted_then_completed(start):
    settings = (
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=1",
        "telemetry.samples_per_step=8",
        "telemetry.wandb={mode: offline}",
    )
    run = start("schedule.steps=500", *settings)
    block_the_file_of(run, version=4)
    run.wait_for_step(5)  # training continues although the files of step 4 cannot be written
    run.kill("learner.0")
    output = run.wait()
    assert run.process.returncode == 1, output
    places = run.directory / "checkpoints"
    assert {path.name for path in places.iterdir()} == {"reference", "step_000002", "step_000004.partial"}

    run = start("schedule.steps=500", *settings, resume=run.directory)
    run.wait_for_step(7)
    for _ in range(2):  # as when a connection is lost: from the terminal, and from the shell
        run.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
    output = run.wait()
    assert run.process.returncode == 130, output
    summary = run.summary()
    steps = summary["steps"]
    assert summary["status"] == "interrupted"
    assert 7 <= steps < 500
    assert {path.name for path in places.iterdir()} == {"final", "reference", f"step_{steps:06d}"}
    assert command("verify-weights", places / "final", places / f"step_{steps:06d}").returncode == 0

    run = start(f"schedule.steps={steps + 3}", *settings, resume=run.directory)
    output = run.wait()
    assert run.process.returncode == 0, output
    assert_every_step_once(run, steps + 3)
    assert_wandb_has_one_run(run)
    again = start(f"schedule.steps={steps + 3}", resume=run.directory)
    assert "is completed: all" in again.wait()
    assert again.process.returncode == 0
    assert not list(run.directory.parent.glob("*.1"))


def block_the_file_of(run, version: int) -> None:
    """Whoever opens a pipe that nobody reads waits for ever: the save is under way until it is killed."""
    deadline = time.monotonic() + 60
    while not (run.directory / "model/config.json").exists():
        assert time.monotonic() < deadline, run.process.poll()
        time.sleep(0.05)
    partial = run.directory / f"checkpoints/step_{version:06d}.partial"
    partial.mkdir(parents=True)
    os.mkfifo(partial / "__0_0.distcp")


def assert_every_step_once(run, steps: int) -> None:
    summary = run.summary()
    assert (summary["status"], summary["steps"]) == ("completed", steps)
    assert summary["staleness"]["max"] <= 1
    assert steps * PER_STEP == summary["samples_trained"] + summary["samples_not_selected"]
    assert summary["samples_generated"] == steps * PER_STEP + summary["samples_cancelled"]
    assert set(summary["eval"]) == {"before", "after"}
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, steps + 1))
    assert [line["step"] for line in run.lines("samples.jsonl")] == [
        step for step in range(1, steps + 1) for _ in range(8)
    ]


def assert_wandb_has_one_run(run) -> None:
    """Three starts, one id, and a row for each step that holds every metric."""
    assert len(run_ids(run.directory)) == 1
    assert len(list((run.directory / "wandb").glob("offline-run-*"))) == 3
    found = rows(run.directory)
    for line in run.lines("metrics.jsonl"):
        row = found[6 + 2 * line["step"]]  # after the six steps of the warm start
        assert line.items() <= row.items()
    assert "eval/reward" in found[max(found)]
    assert all("warm_start/loss" in found[step] for step in range(1, 7))


@pytest.mark.slow
@pytest.mark.thorough  # tests/cluster has a job that ends before its time limit
def test_a_run_that_is_out_of_time_saves_what_it_has(start):
    """So early that there is only the warm start to save."""
    run = start("checkpoint.max_run_seconds=0.1")
    output = run.wait()
    assert run.process.returncode == 130, output
    assert "checkpoint.max_run_seconds = 0.1 are over" in output
    assert run.summary()["status"] == "interrupted"
    assert (run.directory / "checkpoints/step_000000/metadata.json").is_file()
    assert command("verify-weights", run.directory, run.directory / "checkpoints/reference").returncode == 0
