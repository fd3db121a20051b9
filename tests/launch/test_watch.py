"""`async-rlhf watch` on the files of runs that are still running, have ended, or were killed."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.owner import owner_places, owning
from megatron_async_rlhf.launch.watch import Heartbeat
from megatron_async_rlhf.telemetry.events import EventLog

STEP = {"event": "step", "steps": 3, "reward": 0.5, "loss": 0.7, "kl": None, "staleness": 1.0, "samples_per_s": 9.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config_of(directory)))
    return directory


def config_of(directory: Path) -> RunConfig:
    return RunConfig.model_validate({"model": {"hf": "some/model"}, "run": {"dir": str(directory)}})


def write(run: Path, *events: dict) -> None:
    with EventLog(run / "logs/events.jsonl") as log:
        for event in events:
            log.append(event)


def watched(run: Path) -> str:
    result = CliRunner().invoke(app, ["watch", str(run)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_that_has_ended_is_told_at_once(run: Path):
    write(
        run,
        {"event": "phase", "name": "start"},
        STEP | {"step": 1},
        {"event": "closed", "status": "completed", "error": None},
    )
    assert "step 1/3  reward 0.500" in watched(run) and f"completed: {run}" in watched(run)


def test_only_the_last_start_of_a_resumed_run_is_told(run: Path):
    write(run, {"event": "phase", "name": "start"}, STEP | {"step": 1})
    write(
        run,
        {"event": "phase", "name": "start"},
        STEP | {"step": 2},
        {"event": "closed", "status": "completed", "error": None},
    )
    assert "step 1/3" not in watched(run) and "step 2/3" in watched(run)


def test_a_run_that_was_killed_is_told_so(run: Path):
    write(run, {"event": "phase", "name": "start"}, STEP | {"step": 1})
    assert "error: the run has ended without saying how" in watched(run)


def test_a_failure_is_told(run: Path):
    write(run, {"event": "phase", "name": "start"}, {"event": "closed", "status": "failed", "error": "a reward failed"})
    output = watched(run)
    assert "error: a reward failed" in output and f"failed: {run}" in output


def test_a_run_is_followed_to_its_end(run: Path):
    write(run, {"event": "phase", "name": "start"})

    def go_on() -> None:
        with owning(config_of(run)):
            for step in (1, 2, 3):
                time.sleep(0.5)
                text = json.dumps({"time": time.time(), **STEP, "step": step}) + "\n"
                with (run / "logs/events.jsonl").open("a") as file:  # in two pieces, as a reader may meet a line
                    file.write(text[:20])
                    file.flush()
                    time.sleep(0.4)
                    file.write(text[20:])
            write(run, {"event": "closed", "status": "completed", "error": None})

    writer = threading.Thread(target=go_on)
    writer.start()
    time.sleep(0.3)
    output = watched(run)
    writer.join()
    assert [f"step {n}/3" in output for n in (1, 2, 3)] == [True] * 3 and f"completed: {run}" in output


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path):
    from megatron_async_rlhf.launch.watch import watch

    with pytest.raises(ConfigError, match="the run has not begun"):
        watch(run)
    with pytest.raises(ConfigError, match="is no run's directory: it has no config.yaml"):
        watch(tmp_path)


def test_the_supervisors_account_comes_before_the_controllers(run: Path):
    write(run, {"event": "phase", "name": "start"}, {"event": "closed", "status": "failed", "error": "another process"})
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "generator.0 was killed by SIGKILL"}))
    assert "error: generator.0 was killed by SIGKILL" in watched(run)


@pytest.mark.parametrize("may_write", [True, False])
def test_a_run_is_found_from_another_directory_by_whoever_may_read_it(tmp_path: Path, monkeypatch, may_write: bool):
    """Its configuration has a relative directory, or none."""
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({"model": {"hf": "some/model"}, "run": {"name": "x"}})
    run = tmp_path / "runs/x"
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    write(run, {"event": "phase", "name": "start"}, STEP | {"step": 1})
    with owning(config):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        if not may_write:
            monkeypatch.setattr(os, "access", lambda *arguments: False)
        assert Heartbeat(owner_places(run))()
    assert not Heartbeat(owner_places(run))()
