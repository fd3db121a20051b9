"""Runs a job: starts every process on its machine, shows progress, watches them all, and ends them together.

    start all ─> watch ──┬─ controller ends with 0 ───────────────> completed
                         ├─ a server dies in training ──> start it again, same name, port, cores and log
                         ├─ the controller asks for other servers ──> end those there are, start the others
                         ├─ the controller says that one does nothing ──> kill it: a server has died
                         ├─ a rank of the learner dies or hangs ──> learner and controller again, from the last checkpoint
                         ├─ any other death, a machine is lost ──> end the others ──> failed, naming it
                         └─ Ctrl-C, SIGTERM, SIGHUP, or a file `stop` in the run directory
                                └──> controller finishes its step, saves and exports ──> interrupted

A server, a generator's or a reward model's, that has been started again `restarts` times stays down when it dies once
more: the controller continues with the others, and ends the run when none is left. Before training begins a death is more
likely a setting that cannot work, and ends the run. The learner is started again `run.max_restarts` times, with the
controller; servers continue meanwhile, and get their weights anew (`going_back`).

The supervisor never talks to learner or servers; it owns only their lives and cores (`floating`). The controller's events come
through its standard output.
"""

import contextlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError, ConfigError, DataError, ProcessDiedError, WriteError
from megatron_async_rlhf.launch.causes import signal_hint
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.fleet import Fleet
from megatron_async_rlhf.launch.floating import FloatingProcesses
from megatron_async_rlhf.launch.going_back import CutBack, going_on_from, newest_whole
from megatron_async_rlhf.launch.plan import ProcessPlan, ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess, Process
from megatron_async_rlhf.launch.scratch import remove_abandoned
from megatron_async_rlhf.launch.stacks import dump_stacks
from megatron_async_rlhf.launch.terminal import handling_interrupts
from megatron_async_rlhf.telemetry.events import LAST_PHASE, EventLog, parse_event
from megatron_async_rlhf.telemetry.files import (
    EVENTS,
    EXIT_CODE,
    LOG_DIR,
    PROCESSES,
    RESERVE,
    STOP,
    SUMMARY,
    hold_reserve,
    release_reserve,
    replace_file,
    writing,
)
from megatron_async_rlhf.telemetry.summary import UNFINISHED, RunTotals, read_summary

_POLL_S = 0.1
# When one process dies others notice and fail too; a moment later the first cause can be told from the rest.
_SETTLE_S = 1.0
_EXIT_CODES = {"completed": 0, "failed": 1, "interrupted": 130}
EXIT_INTERRUPTED = _EXIT_CODES["interrupted"]
EXIT_MACHINE_LOST = 75  # as sysexits.h has it: it may go better another time, on other machines


class Supervisor:
    """One run on the machines of a fleet."""

    def __init__(
        self,
        config: RunConfig,
        plan: ProcessPlan,
        run_dir: Path,
        display: Display,
        fleet: Fleet,
        *,
        cut_back: CutBack | None = None,
        taken: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            cut_back: None: the job cannot continue from a checkpoint.
            taken: who else runs in the directory by now; nothing is written there any more then.
        """
        self._cut_back, self._times_back = cut_back, 0
        self._taken = taken
        self._config, self._plan, self._run_dir = config, plan, run_dir
        self._display, self._fleet = display, fleet
        self._processes: list[Process] = []
        self._pids: dict[str, int | None] = {}
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._floating = FloatingProcesses(config)
        self._interrupts = 0
        self._stop_file = run_dir / STOP
        self._training = self._learner_is_done = self._learner_is_silent = self._is_machine_lost = False
        self._restarts = {spec.name: 0 for spec in plan.servers if spec.restarts}
        self._started: dict[str, float] = {}  # by the monotonic clock, which all processes of a machine share
        self._killed: dict[str, str] = {}  # processes that did nothing, and how that was found
        self._failure: str | None = None  # the controller's own account, if it gave one
        self._explained = False  # it says all there is to know
        self._requested: str | None = None  # servers that the controller asks for
        self._totals: dict[str, Any] = {}  # its summary, if it could not write that down itself

    def run(self) -> int:
        """Start, watch, end; returns the exit code: 0 completed, 1 failed, 130 interrupted, 75 failed as a machine fell silent."""
        with handling_interrupts(self._on_interrupt):  # also while the last words are written
            return self._run()

    def _run(self) -> int:
        try:
            self._start()
            status, error, tail = self._watch()
        except WriteError as failure:
            status, error, tail = "failed", str(failure), []
        finally:
            self._end(self._processes)
        self._drain_events()
        self._write_last_summary(status, error, tail)
        self._display.finished(status, error, tail, self._run_dir)
        if status != "completed" and RunCheckpoints(self._run_dir).versions():
            self._display.note("the same command with --resume continues from its last checkpoint")
        if status != "completed" and self._plan.on_request:
            self._display.note("the same command with --resume keeps the answers that are there, and continues")
        code = EXIT_MACHINE_LOST if self._is_machine_lost and status == "failed" else _EXIT_CODES[status]
        with contextlib.suppress(OSError):  # what starts it on several machines may lose it, as srun does
            (self._run_dir / EXIT_CODE).write_text(f"{code}\n", encoding="utf-8")
        return code

    def _start(self) -> None:
        remove_abandoned()
        log_dir = self._run_dir / LOG_DIR
        with writing(log_dir):
            log_dir.mkdir(parents=True, exist_ok=True)
        with writing(self._run_dir / RESERVE):
            hold_reserve(self._run_dir)
        self._write_summary(*UNFINISHED, [])
        self._start_with_controller(self._plan.processes)

    def _start_with_controller(self, specs: Sequence[ProcessSpec]) -> None:
        """Which is the last of them."""
        for spec in specs:
            self._processes.append(self._start_process(spec, pipe_stdout=spec.name == self._plan.controller.name))
        self._controller = self._processes[-1]
        self._write_pids()
        self._listener = threading.Thread(target=self._read_events, args=[self._controller], daemon=True)
        self._listener.start()

    def _start_process(self, spec: ProcessSpec, *, pipe_stdout: bool = False) -> Process:
        self._started[spec.name] = time.monotonic()
        log_dir = self._run_dir / LOG_DIR
        with writing(log_dir / f"{spec.name}.log"):
            return self._fleet.start(spec, log_dir, pipe_stdout=pipe_stdout)

    def _write_pids(self) -> None:
        """If they have changed; those on other machines are told a moment after the start."""
        pids = {process.name: process.pid for process in self._processes}
        if pids != self._pids:
            self._pids = pids
            machines = {process.name: self._fleet.machine_name(process.spec.node) for process in self._processes}
            with writing(self._run_dir / PROCESSES):
                replace_file(self._run_dir / PROCESSES, json.dumps(pids | {"machines": machines}) + "\n")

    def _read_events(self, controller: Process) -> None:
        assert isinstance(controller, LocalProcess)  # it is on this machine
        with EventLog(self._run_dir / EVENTS) as log:
            for line in controller.stdout:
                event = parse_event(line)
                if event is not None:
                    log.append(event)
                    self._events.put(event)

    def _watch(self) -> tuple[str, str | None, list[str]]:
        """Until the run is over: status, error, and the last log lines of whoever caused it."""
        asked = 0
        deadline = None
        while True:
            self._drain_events()
            self._change_servers()
            self._write_pids()
            if self._controller.returncode == 0:
                return "completed", None, []
            if self._stop_file.exists():
                self._interrupts += 1
                try:
                    self._stop_file.unlink()  # a run that continues from here was not asked
                except OSError:  # somebody else's, perhaps: it has been seen, and asks no second time
                    self._stop_file = self._run_dir / f"{STOP}.again"
            if self._interrupts > asked:
                asked = self._interrupts
                if asked > 1:
                    return "interrupted", "interrupted twice: ended without saving", []
                self._display.note("interrupted: finishing the step under way (interrupt again to stop immediately)")
                self._controller.signal(signal.SIGTERM)
                deadline = time.monotonic() + self._config.launch.interrupt_grace_s
            gone = self._fleet.lost()
            if why := gone.why if gone else self._taken():
                self._is_machine_lost = gone is not None and gone.is_silent
                return "failed", why, []
            if self._controller.returncode == EXIT_INTERRUPTED:  # it was asked to, or knew when to stop
                return "interrupted", None, []
            if deadline and time.monotonic() > deadline:
                return (
                    "interrupted",
                    f"the step under way did not finish within {self._config.launch.interrupt_grace_s:g} s",
                    [],
                )
            if not asked:
                self._revive()
            if self._training:
                self._floating.place(self._processes)
            if self._dead():
                time.sleep(_SETTLE_S)
                self._drain_events()
                if self._controller.returncode in (0, EXIT_INTERRUPTED) or not self._dead():
                    continue
                status, error, tail = self._blame()
                if not asked and self._go_back(error):
                    continue
                # Who ends a whole job tells every process of it to end.
                return ("interrupted" if asked else status), error, tail
            time.sleep(_POLL_S)

    def _change_servers(self) -> None:
        """If the controller has asked for others than there are."""
        if self._requested is None or self._interrupts:
            return
        name, self._requested = self._requested, None
        replaced = {spec.name for specs in self._plan.on_request.values() for spec in specs}
        self._end([process for process in self._processes if process.name in replaced])
        self._processes = [process for process in self._processes if process.name not in replaced]
        for spec in self._plan.on_request[name]:
            self._processes.insert(0, self._start_process(spec))  # the controller stays the last

    def _dead(self) -> list[Process]:
        """Processes that ended when they should not have. Learner ranks leave just before the controller does, some of them
        in their libraries' last calls, and a server that may no longer be started again is the controller's affair."""
        gone = [process for process in self._processes if process.returncode is not None]
        expendable = set(self._restarts) if self._training else set()
        expendable |= {p.name for p in gone if p.name in self._ranks and (p.returncode == 0 or self._learner_is_done)}
        return [process for process in gone if process.name not in expendable]

    def _revive(self) -> None:
        """Start servers that died again, unless they have been too often."""
        if not self._training:
            return
        for i, process in enumerate(self._processes):
            used, limit = self._restarts.get(process.name), process.spec.restarts
            if used is None or process.returncode is None or used > limit:
                continue
            self._restarts[process.name] = used + 1
            process.kill_group(signal.SIGKILL)  # its workers hold the cores, and perhaps the port
            process.clean_up()
            if used == limit:
                self._display.note(
                    f"{process.name} {process.ending()}; {process.spec.restarts_key} = {used} are used up"
                )
                continue
            self._display.note(f"{process.name} {process.ending()}; started again ({used + 1} of {limit})")
            self._killed.pop(process.name, None)
            self._processes[i] = self._start_process(process.spec)

    def _go_back(self, error: str) -> bool:
        """Start learner and controller again from the last checkpoint, if it is the learner that failed, so."""
        ours = [p for p in self._processes if p.name in self._ranks or p is self._controller]
        failed = self._learner_is_silent or any(process in ours[:-1] for process in self._dead())
        limit = self._config.run.max_restarts
        if self._cut_back is None or not failed or any(process not in ours for process in self._dead()):
            return False
        if self._times_back >= limit or not RunCheckpoints(self._run_dir).versions():
            return False
        self._end(ours)  # before: the controller may be about to put a newer checkpoint in the place of the last
        self._listener.join(self._config.launch.shutdown_grace_s)
        self._drain_events()
        if (version := newest_whole(self._run_dir)) is None:
            return False
        self._times_back += 1
        self._display.note(f"{error}; continuing from step {version} (run.max_restarts: {self._times_back} of {limit})")
        self._failure, self._explained, self._learner_is_silent, self._totals = None, False, False, {}
        for process in ours:
            self._killed.pop(process.name, None)
        try:
            self._cut_back(version)
        except (ConfigError, CheckpointError, DataError) as failure:
            raise WriteError(f"{error}; {failure}") from None
        self._processes = [process for process in self._processes if process not in ours]
        self._start_with_controller(going_on_from(self._plan, version))
        return True

    @property
    def _ranks(self) -> set[str]:
        """Names of the learner's."""
        return {spec.name for spec in self._plan.learners}

    def _blame(self) -> tuple[str, str, list[str]]:
        """A process that died by itself comes before a controller that only reports what it saw."""
        dead = self._dead()
        others = [process for process in dead if process is not self._controller]
        learners = [process for process in self._processes if process.name in self._ranks]
        if self._learner_is_silent or any((process.returncode or 0) > 0 and process in learners for process in others):
            if stopped := dump_stacks(learners):
                names = ", ".join(process.name for process in stopped)
                error = ProcessDiedError(
                    f"{names} did nothing any more, not even react to a signal: stopped, or its machine hangs"
                )
                return "failed", str(error), stopped[0].last_lines()
        if self._failure and self._explained and not others:
            return "failed", self._failure, []
        if self._failure and not others:
            named = next((p for p in self._processes if self._failure.startswith(p.name)), self._controller)
            return "failed", *self._with_cause(self._failure, named)
        culprit = min(others or dead, key=lambda process: (process.returncode or 0) >= 0)
        if why := self._killed.get(culprit.name):
            return "failed", str(ProcessDiedError(why)), culprit.last_lines()
        hint = signal_hint(culprit.returncode)
        error = ProcessDiedError(f"{culprit.name} {culprit.ending()}{', ' if hint else ''}{hint}; see {culprit.log}")
        return "failed", *self._with_cause(str(error), culprit)

    def _with_cause(self, error: str, process: Process) -> tuple[str, list[str]]:
        """The error with what the process's log says first of it, and these lines. Without such the end of the log, but of
        a process that was killed: what it said last has nothing to do with it."""
        cause = process.cause()
        if cause is None:
            return error, [] if (process.returncode or 0) < 0 else process.last_lines()
        told = cause.line in error or error in cause.line
        return error if told else f"{error}; its log says: {cause.line}", cause.lines

    def _drain_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            if event["event"] == "phase":
                self._training |= event["name"] == "train"
                self._learner_is_done = event["name"] == LAST_PHASE
            if event["event"] == "unresponsive":
                self._learner_is_silent |= event["name"] == "learner"
                self._kill(event["name"], event["since"], event["why"])
            if event["event"] == "serve":
                self._requested = event["name"]
            if event["event"] == "closed" and event["status"] == "failed":
                self._failure, self._explained = event["error"], event.get("explained", False)
            if event["event"] == "closed":
                self._totals = event.get("summary", {})
            self._display.show(event)

    def _kill(self, name: str, since: float, why: str) -> None:
        """End a process that has done nothing since then, unless another has been started in its place."""
        for process in self._processes:
            if process.name == name and process.returncode is None and self._started[name] < since:
                self._killed[name] = why
                self._display.note(f"{why}; killed")
                process.kill_group(signal.SIGKILL)

    def _on_interrupt(self, number: int, frame: object) -> None:
        self._interrupts += 1

    def _end(self, processes: Sequence[Process]) -> None:
        """What ends each of them, and SIGKILL after the grace period."""
        for process in processes:
            if process.name == self._plan.controller.name:
                process.signal(process.spec.end_signal)  # to W&B's process, a child of it, it talks until the end
            else:
                process.kill_group(process.spec.end_signal)
        deadline = time.monotonic() + self._config.launch.shutdown_grace_s
        while time.monotonic() < deadline and any(process.returncode is None for process in processes):
            time.sleep(_POLL_S)
        for process in processes:
            process.kill_group(signal.SIGKILL)
        for process in processes:
            process.clean_up()

    def _write_last_summary(self, status: str, error: str | None, tail: list[str]) -> None:
        """Into the room that was kept for it, should there be no other."""
        if self._taken():
            return
        try:
            self._write_summary(status, error, tail)
        except WriteError:
            release_reserve(self._run_dir)
            try:
                self._write_summary(status, error, tail)
            except WriteError as failure:
                self._display.note(f"error: {failure}")
        release_reserve(self._run_dir)

    def _write_summary(self, status: str, error: str | None, tail: list[str]) -> None:
        """The controller's own summary, or what it had written before it died, with what has become of the run."""
        path = self._run_dir / SUMMARY
        summary = self._totals or read_summary(self._run_dir) or RunTotals.of(self._config).to_summary(status, error)
        summary |= {"status": status, "error": error}
        summary.pop("log_tail", None)
        if tail:
            summary["log_tail"] = tail
        with writing(path):
            replace_file(path, json.dumps(summary, indent=1) + "\n")
