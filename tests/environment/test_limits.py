"""Limits of open files: raised where they may be, waited for where they suffice, refused before the start where not."""

import asyncio
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web
from shells import TINY, limited, results, settings, start

from megatron_async_rlhf import limits
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError
from megatron_async_rlhf.generator.places import places, places_problem, threads_problem
from megatron_async_rlhf.serving.connection import NO_LIMIT, SAMPLE, Connection

FILES = resource.RLIMIT_NOFILE
RAISE = (
    "from megatron_async_rlhf.limits import open_files, raise_soft_limits; raise_soft_limits(); import resource;"
    "print(open_files(), *(resource.getrlimit(n) for n in (resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)))"
)


class Server:
    """Answers requests for samples once it is told to, everything else at once; counts those that wait."""

    def __init__(self) -> None:
        self.resumed = asyncio.Event()
        self.waiting = self.most = 0

    async def __aenter__(self) -> "Server":
        app = web.Application()
        app.router.add_post(SAMPLE, self._sample)
        app.router.add_get("/load", self._load)
        app.router.add_get("/health", self._load)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _sample(self, request: web.Request) -> web.Response:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await self.resumed.wait()
        self.waiting -= 1
        return web.json_response(await request.json())

    async def _load(self, request: web.Request) -> web.Response:
        return web.json_response({"server_load": self.waiting})


def test_requests_without_a_place_wait_and_others_pass_them():
    asyncio.run(_more_requests_than_places())


async def _more_requests_than_places():
    async with Server() as server:
        connection = Connection("generator.0", server.url, 10.0, places=5)
        asked = [asyncio.create_task(connection.post(SAMPLE, {"n": n}, NO_LIMIT)) for n in range(40)]
        async with asyncio.timeout(10):
            while (await connection.get("/load"))["server_load"] < 5:
                await asyncio.sleep(0.01)
        server.resumed.set()
        assert [answer["n"] for answer in await asyncio.gather(*asked)] == list(range(40))
        assert server.most == 5
        await connection.close()


def test_a_limit_of_ours_is_not_a_server_that_is_gone():
    asyncio.run(_more_requests_than_files())


async def _more_requests_than_files():
    soft, hard = resource.getrlimit(FILES)
    async with Server() as server:
        connection = Connection("generator.0", server.url, 10.0)
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(FILES, (used + 4, hard))
        try:
            asked = [asyncio.create_task(connection.post(SAMPLE, {}, NO_LIMIT)) for _ in range(20)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION, timeout=10)
            error = next(task.exception() for task in done if task.exception())
            assert isinstance(error, GeneratorError) and not isinstance(error, GeneratorGoneError)
            assert f"the limit of open files ({used + 4}) is reached; raise it (ulimit -n)" in str(error)
            with pytest.raises(GeneratorError, match="the limit of open files"):
                await connection.has_engine()
        finally:
            resource.setrlimit(FILES, (soft, hard))
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await connection.close()


def test_soft_limits_are_raised():
    hard = resource.getrlimit(FILES)[1]
    raised = subprocess.run(
        [sys.executable, "-c", RAISE], capture_output=True, encoding="utf-8", preexec_fn=limited(FILES, 256, hard)
    )
    assert raised.stdout.split()[0] == str(min(hard, 65536)), raised.stderr


@pytest.mark.parametrize(
    ("limit", "most", "said"),
    [
        (resource.RLIMIT_AS, 32 << 30, "virtual memory: the limit is 34359738368 bytes"),
        (resource.RLIMIT_DATA, 16 << 30, "data segments: the limit is 17179869184 bytes"),
        (resource.RLIMIT_CPU, 3600, "CPU time of a process: the limit is 3600 seconds"),
        (resource.RLIMIT_FSIZE, 1 << 20, "size of a file: the limit is 1048576 bytes"),
    ],
)
def test_a_limit_that_a_run_cannot_work_under_is_raised_or_refused(tmp_path: Path, limit: int, most: int, said: str):
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}")]
    refused = start(command, tmp_path, prepare=limited(limit, most))
    assert refused.returncode == 2
    assert refused.stdout.startswith(f"error: {said}, and a run needs this unlimited; raise it (ulimit -")
    assert refused.stdout.count("\n") == 1 and list(tmp_path.iterdir()) == []
    program = (
        "from megatron_async_rlhf.limits import limit_problems, raise_soft_limits as r; r(); print(limit_problems())"
    )
    raised = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        preexec_fn=limited(limit, most, resource.RLIM_INFINITY),
    )
    assert raised.stdout == "[]\n", raised.stderr


def test_as_many_places_as_there_are_files(monkeypatch):
    monkeypatch.setattr("megatron_async_rlhf.generator.places.open_files", lambda: 1024)
    held_out = load_config(TINY, ["data.eval_prompts=1319"])
    assert places(held_out) == 864 and places_problem(held_out) is None
    many = load_config(TINY, ["data.eval_prompts=1319", "generator.replicas=16", "generator.max_concurrent=64"])
    assert places_problem(many).startswith(
        "open files: the limit is 1024, and generator.replicas = 16 with 128 requests each need 2208; raise it (ulimit -n 2208"
    )


def test_too_few_threads_are_refused(monkeypatch):
    config = load_config(TINY, ["learner.ranks=2", "algorithm.samples_per_prompt=3"])
    for left, refused in ((None, False), (400, False), (300, True), (0, True)):
        monkeypatch.setattr("megatron_async_rlhf.generator.places.threads_left", lambda left=left: left)
        said = threads_problem(config)
        assert (said is not None) == refused
        if refused:
            assert said.startswith(f"processes and threads: {left} more may be started, and a run needs about 320 here")


def test_threads_are_counted_by_the_container(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(limits, "_PIDS", tmp_path)
    assert limits.threads_left() is None or os.geteuid()
    (tmp_path / "pids.max").write_text("max\n", encoding="utf-8")
    (tmp_path / "pids.current").write_text("70\n", encoding="utf-8")
    assert limits.threads_left() is None or os.geteuid()
    (tmp_path / "pids.max").write_text("100\n", encoding="utf-8")
    assert limits.threads_left() <= 30


@pytest.mark.parametrize("flags", [(), ("-s", "schedule.generation=streaming")])
def test_too_few_files_are_refused_before_the_start(tmp_path: Path, flags: tuple[str, ...]):
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}", "data.eval_prompts=512"), *flags]
    refused = start(command, tmp_path, prepare=limited(FILES, 200))
    assert refused.returncode == 2
    assert refused.stdout.startswith("error: open files: the limit is 200, and generator.replicas = 1 with 64 requests")
    assert refused.stdout.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_1319_held_out_prompts_need_no_more_than_1024_files(tmp_path: Path):
    """As many as GSM8K's test set has. Where requests wait changes no digit."""
    made = []
    for name, prepare in (("unlimited", None), ("limited", limited(FILES, 1024))):
        run = tmp_path / name
        overrides = settings(f"run.dir={run}", "data.eval_prompts=1319", "schedule.mode=sync", "schedule.steps=2")
        told = start(["train", str(TINY), *overrides], tmp_path, prepare=prepare)
        assert told.returncode == 0, told.stdout
        made.append(results(run))
    assert len(made[0]["evaluations.jsonl"]) == 2 * 1319
    assert made[0] == made[1]
