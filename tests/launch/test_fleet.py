"""A first machine in this process and others in processes of their own, all of them on this one: joining, starting,
losing each other, and every way of not coming together."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch import start
from megatron_async_rlhf.launch.agent import Link, serve
from megatron_async_rlhf.launch.fleet import Switchboard, gather
from megatron_async_rlhf.launch.nodes import check_node_rank, free_ports, this_node
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.rendezvous import (
    Alive,
    Join,
    Left,
    Refused,
    Rendezvous,
    Welcome,
    encode,
    fingerprint,
    read_rendezvous,
    rendezvous_path,
    write_rendezvous,
)
from megatron_async_rlhf.launch.stacks import dump_stacks

TINY = Path(__file__).parents[1] / "e2e/tiny.yaml"
TRAIN = "megatron_async_rlhf", "train", str(TINY)
LIMIT_S = 60


class Cluster:
    """Starts agents the way a user does, and ends them."""

    def __init__(self, directory: Path) -> None:
        self.settings = [f"run.dir={directory / 'run'}", "launch.nodes=2", "launch.join_timeout_s=30"]
        self.agents: list[subprocess.Popen] = []

    def config(self, *overrides: str):
        return load_config(TINY, [*self.settings, *overrides])

    def agent(self, *overrides: str, rank: int = 1) -> subprocess.Popen:
        settings = [word for setting in (*self.settings, *overrides) for word in ("-s", setting)]
        environment = {**os.environ, "SLURMD_NODENAME": f"m{rank}"}
        command = [sys.executable, "-m", *TRAIN, "--node-rank", str(rank), *settings]
        self.agents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return self.agents[-1]

    def end(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.wait()


@pytest.fixture
def cluster(tmp_path: Path):
    made = Cluster(tmp_path)
    yield made
    made.end()


def ended(agent: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what it said."""
    _, said = agent.communicate(timeout=LIMIT_S)
    return agent.returncode, said


def spec(name: str, program: str, node: int = 1) -> ProcessSpec:
    arguments = [sys.executable, "-c", program]
    return ProcessSpec(name=name, arguments=arguments, environment={"WORD": "there"}, cores=[0], node=node)


def wait(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def temporary_directory(pid: int) -> Path:
    variables = dict(line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return Path(variables["TMPDIR"])


STAND = "import os, time; print(os.environ['WORD'], sorted(os.sched_getaffinity(0)), flush=True); time.sleep(600)"
# With a child in a process group of its parent's.
FAMILY = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def test_processes_start_and_end_elsewhere(cluster, tmp_path):
    config, agent = cluster.config(), cluster.agent()
    with gather(config) as fleet:
        assert [node.name for node in fleet.nodes[1:]] == ["m1"]
        assert oct(rendezvous_path(config).stat().st_mode)[-3:] == "600"
        stands, ends, family = (
            fleet.start(spec("stands", STAND), tmp_path),
            fleet.start(spec("ends", "raise SystemExit(3)"), tmp_path),
            fleet.start(spec("family", FAMILY), tmp_path),
        )
        wait(lambda: ends.returncode is not None and stands.last_lines() and family.last_lines())
        assert (ends.returncode, ends.ending()) == (3, "ended with exit code 3")
        assert stands.last_lines() == ["there [0]"]
        assert is_alive(stands.pid) and stands.returncode is None
        stands.signal(signal.SIGTERM)
        wait(lambda: stands.returncode is not None)
        assert stands.ending() == "was killed by SIGTERM"
        (child,) = map(int, family.last_lines())
        temporary = temporary_directory(family.pid)
        assert temporary.is_dir()
        family.kill_group(signal.SIGKILL)
        wait(lambda: family.returncode == -9 and not is_alive(child))
        wait(lambda: not temporary.exists())
        left = fleet.start(spec("left", STAND), tmp_path)
        wait(lambda: left.last_lines())
        temporary = temporary_directory(left.pid)
        assert fleet.lost() is None
    assert ended(agent) == (0, "")
    assert not is_alive(left.pid) and not temporary.exists()
    assert not rendezvous_path(config).exists()


# Ready for the signal as a learner rank is.
RANK = f"import faulthandler, signal; faulthandler.register(signal.SIGUSR1); {STAND}"


def test_a_stopped_rank_is_told_from_the_others_on_its_own_machine(cluster, tmp_path):
    """The first machine looks into no log for it."""
    agent = cluster.agent()
    with gather(cluster.config()) as fleet:
        ranks = [fleet.start(spec(f"learner.{i}", RANK), tmp_path) for i in range(2)]
        wait(lambda: all(rank.last_lines() for rank in ranks))
        for rank in ranks:
            rank.log = tmp_path / "not seen yet"
        assert dump_stacks(ranks) == []
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert dump_stacks(ranks) == [ranks[1]]
    assert ended(agent) == (0, "")


def test_a_machine_that_falls_silent_is_lost(cluster, tmp_path):
    agent = cluster.agent("launch.node_timeout_s=5")
    with gather(cluster.config("launch.node_timeout_s=5")) as fleet:
        agent.send_signal(signal.SIGSTOP)
        wait(lambda: fleet.lost() is not None)
        assert fleet.lost().is_silent
        assert fleet.lost().why.startswith("node 1 (m1) is silent for more than launch.node_timeout_s = 5")
        agent.send_signal(signal.SIGCONT)


def test_a_machine_without_the_run_directory_says_so(cluster, tmp_path):
    agent = cluster.agent()
    with gather(cluster.config()) as fleet:
        fleet.start(spec("nowhere", STAND), tmp_path / "not there")
        wait(lambda: fleet.lost() is not None)
        assert not fleet.lost().is_silent, "it would say the same again"
        assert "nowhere cannot be started" in fleet.lost().why and "run.dir" in fleet.lost().why
    assert ended(agent)[0] == 2


FIRST = """
import sys, time
from pathlib import Path
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.launch.agent import Link
from megatron_async_rlhf.launch.fleet import Switchboard, gather
from megatron_async_rlhf.launch.plan import ProcessSpec
config = load_config(Path(sys.argv[1]), sys.argv[3:])
with gather(config) as fleet:
    spec = ProcessSpec(name="far", arguments=["sleep", "600"], environment={}, cores=[], node=1)
    far = fleet.start(spec, Path(sys.argv[2]))
    while far.pid is None: time.sleep(0.02)
    print(far.pid, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_the_first_machine(cluster, tmp_path):
    """Killed without a word: the others end what they have started."""
    settings = [*cluster.settings, "launch.node_timeout_s=5"]
    command = [sys.executable, "-c", FIRST, str(TINY), str(tmp_path), *settings]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    agent = cluster.agent("launch.node_timeout_s=5")
    pid = int(first.stdout.readline())
    agent.send_signal(signal.SIGTERM)  # as Slurm does with all of a job; it is for the first machine to decide
    for _ in range(2):
        time.sleep(0.3)
        agent.send_signal(signal.SIGHUP)  # of a terminal that closes; it is not the second time that it is asked to end
    time.sleep(0.5)
    assert is_alive(pid) and agent.poll() is None
    first.kill()
    first.wait()
    code, said = ended(agent)
    assert code == 1 and "the first machine is silent for more than launch.node_timeout_s = 5" in said
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("mine", "theirs", "first_says", "other_says"),
    [
        ([], ["run.seed=7"], "node 1 (m1) is refused: its configuration or version", "its configuration or version"),
        (["launch.join_timeout_s=3"], None, "no machine came as node rank 1 within launch.join_timeout_s = 3", None),
    ],
)
def test_machines_that_do_not_come_together(cluster, mine, theirs, first_says, other_says):
    agent = cluster.agent(*theirs) if theirs is not None else None
    with pytest.raises(ConfigError) as refused, gather(cluster.config(*mine)):
        pass
    assert first_says in str(refused.value)
    if agent is not None:
        code, said = ended(agent)
        assert code == 2 and other_says in said and said.count("\n") == 1


@pytest.mark.parametrize("code", [0, 75, 130])
def test_the_others_end_with_the_code_of_the_first_machine(cluster, monkeypatch, code: int):
    """What a run comes to is known on every machine, where a scheduler may look at each."""
    monkeypatch.setattr(start, "Supervisor", lambda *arguments, **more: SimpleNamespace(run=lambda: code))
    monkeypatch.setattr(start, "_open_directory", lambda config, decided: config.run.path)
    agent, decided = cluster.agent(), start.Start(plan=SimpleNamespace(), template=Path("."))
    assert start.run(cluster.config(), lambda fleet, scratch: decided) == code
    assert ended(agent)[0] == code


@pytest.mark.parametrize(
    ("override", "first_says", "codes"),
    [("schedule.steps=4", None, (0, 0)), ("model={hf: nowhere}", "nowhere", (2, 1))],
    ids=["it is completed", "it cannot start"],
)
def test_what_the_first_machine_finds_ends_the_others(cluster, tmp_path, override, first_says, codes):
    """In a run directory that is completed; they have no more to wait for."""
    config = cluster.config(override)
    config.run.path.mkdir()
    (config.run.path / "config.yaml").write_text(dump_config(cluster.config("schedule.steps=4")))
    (config.run.path / "summary.json").write_text('{"status": "completed", "steps": 4}')
    flags = ["--resume"] if first_says is None else []
    agent = cluster.agent(override)
    settings = [word for setting in (*cluster.settings, override) for word in ("-s", setting)]
    told = CliRunner().invoke(app, ["train", str(TINY), *settings, *flags])
    code, said = ended(agent)
    assert (told.exit_code if first_says is None else 2, code) == codes, told.output
    assert "error: " not in said  # it is the first machine that says what is wrong
    if first_says is not None:
        assert isinstance(told.exception, ConfigError) and first_says in str(told.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_machine_that_goes_while_others_are_awaited_may_come_again(cluster, how):
    """Twice asked to end it says that it leaves; killed it is silent."""
    settings = ["launch.nodes=3", "launch.node_timeout_s=5"]
    with ThreadPoolExecutor() as pool:
        switchboard = Switchboard(cluster.config(*settings))
        path = rendezvous_path(cluster.config())
        write_rendezvous(path, switchboard.rendezvous(["127.0.0.1"]))
        switchboard.start_thread()
        all_here = pool.submit(switchboard.wait_for_all, path)
        agent = cluster.agent(*settings)
        wait(lambda: switchboard._members)
        assert "is taken by m1; if it was ended there" in ended(cluster.agent(*settings))[1]
        while agent.poll() is None:
            agent.send_signal(how)
            time.sleep(0.2)
        wait(lambda: switchboard.lost() is not None)
        second = cluster.agent(*settings, rank=2)
        wait(lambda: 2 in switchboard._members)
        assert not all_here.done()
        again = cluster.agent(*settings)
        assert [join.rank for join in all_here.result(LIMIT_S)] == [1, 2]
        assert ended(cluster.agent(*settings))[1].endswith("node rank 1 is taken by m1\n")
        switchboard.leave(0)
        switchboard.close()
        assert [ended(agent)[0] for agent in (again, second)] == [0, 0]


KEY = zmq.curve_keypair()[0].decode()  # of a first machine that is gone


def bound(socket: zmq.Socket, token: str) -> Rendezvous:
    """Stands for a first machine."""
    public, private = zmq.curve_keypair()
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = public, private
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    expires = time.time() + 60
    return Rendezvous(host="m0", addresses=["127.0.0.1"], port=port, key=public.decode(), token=token, expires=expires)


def test_an_agent_that_gave_up_before_it_was_answered_is_not_there(cluster, tmp_path):
    """Its message was late; the port that it listened on is closed by now."""
    config = cluster.config()
    with ThreadPoolExecutor() as pool:
        gathered = pool.submit(gathered_ports, config)
        path = rendezvous_path(config)
        wait(path.is_file)
        rendezvous, ports = read_rendezvous(path), free_ports(2)
        join = Join(
            rank=1, session="s", fingerprint=fingerprint(config), reached_at="127.0.0.1", node=this_node(config, 0)
        )
        links = []
        for port in ports:
            time.sleep(0.5)
            assert not gathered.done()
            links.append(Link(rendezvous, "127.0.0.1"))
            node = msgspec.structs.replace(join.node, ports=[port, *join.node.ports[1:]])
            links[-1].send(msgspec.structs.replace(join, node=node))
            assert isinstance(links[-1].receive(10), Welcome)
        with socket.create_server(("127.0.0.1", ports[1])):
            links[-1].send(Alive())
            assert gathered.result(LIMIT_S)[1] == ports[1]
        for link in links:
            link.close()


def gathered_ports(config) -> list[int]:
    with gather(config) as fleet:
        return [node.ports[0] for node in fleet.nodes]


def test_a_refusal_of_an_earlier_start_is_forgotten_with_it(cluster, monkeypatch):
    """A machine refused by one start finds the next, which is slow to answer at first."""
    monkeypatch.setattr("megatron_async_rlhf.launch.agent._ANSWER_S", 0.5)
    path = rendezvous_path(cluster.config())
    with ThreadPoolExecutor() as pool, zmq.Context() as context, context.socket(zmq.ROUTER) as first:
        old = bound(first, token="old")
        write_rendezvous(path, old)
        agent = pool.submit(serve, cluster.config(), 1)
        assert first.poll(LIMIT_S * 1000)
        identity, *_ = first.recv_multipart()
        write_rendezvous(path, msgspec.structs.replace(old, token="new"))
        first.send_multipart([identity, encode(Refused("the secret is of an earlier start"))])
        assert first.poll(LIMIT_S * 1000)
        assert first.recv_multipart()[1] == b"new"  # it gets no answer
        while not agent.done():
            if first.poll(20):
                identity, *_ = first.recv_multipart()
                first.send_multipart([identity, encode(Refused("not like this"))])
        with pytest.raises(ConfigError, match="is refused by the first machine, m0: not like this"):
            agent.result()


def test_a_refusal_counts_although_the_first_machine_has_gone_since(cluster):
    """It ends as soon as it has refused one, and takes the file with it."""
    path = rendezvous_path(cluster.config())
    with zmq.Context() as context, context.socket(zmq.ROUTER) as first:
        write_rendezvous(path, bound(first, token="t"))
        agent = cluster.agent()
        assert first.poll(LIMIT_S * 1000)
        identity, *_ = first.recv_multipart()
        path.unlink()
        first.send_multipart([identity, encode(Refused("not like this"))])
        code, said = ended(agent)
    assert code == 2 and said == "error: m1 is refused by the first machine, m0: not like this\n"


def test_a_port_that_is_taken_is_named(cluster):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"launch.port = {port} cannot be listened on"):
            with gather(cluster.config(f"launch.port={port}")):
                pass


def test_an_interface_that_is_not_there_is_named(cluster):
    with pytest.raises(ConfigError, match="launch.interface = ib7: no such interface.*it has .*lo"):
        with gather(cluster.config("launch.interface=ib7")):
            pass


def old_rendezvous(cluster, *, expires: float, address: str = "127.0.0.1") -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]  # nobody listens there once it is closed
    path = rendezvous_path(cluster.config())
    write_rendezvous(path, Rendezvous(host="m0", addresses=[address], port=port, key=KEY, token="old", expires=expires))


@pytest.mark.parametrize(
    ("expires_in", "says"),
    [
        (None, "start the same command on the first machine (node rank 0), and keep run.dir where all machines see it"),
        (
            -1.0,
            "is of an earlier start and has expired (or this machine's clock is ahead of the first one's); start the first",
        ),
        (600.0, "m1 cannot reach the first machine, m0, at any of 127.0.0.1:"),
    ],
)
def test_a_machine_that_does_not_find_the_first(cluster, expires_in, says):
    if expires_in is not None:
        old_rendezvous(cluster, expires=time.time() + expires_in)
    code, said = ended(cluster.agent("launch.join_timeout_s=1"))
    assert code == 2 and says in said and said.startswith("error: ") and said.count("\n") == 1


def test_what_a_crash_left_behind_is_passed_over(cluster):
    """It is not too old, and the next first machine listens on the same port."""
    config = cluster.config(f"launch.port={free_ports(1)[0]}")
    path = rendezvous_path(config)
    old = Rendezvous(
        host="m0", addresses=["127.0.0.1"], port=config.launch.port, key=KEY, token="old", expires=time.time() + 60
    )
    write_rendezvous(path, old)
    agent = cluster.agent(f"launch.port={config.launch.port}")
    with gather(config) as fleet:
        assert [node.name for node in fleet.nodes[1:]] == ["m1"]
    assert ended(agent)[0] == 0


def test_who_does_not_know_the_secret_is_refused(cluster):
    switchboard = Switchboard(cluster.config())
    switchboard.start_thread()
    rendezvous = switchboard.rendezvous(["127.0.0.1"])
    for token in (rendezvous.token[::-1], ""):
        link = Link(msgspec.structs.replace(rendezvous, token=token), "127.0.0.1")
        link.send(Left("I say so"))
        assert link.receive(10) == Refused("the secret is of an earlier start")
        link.close()
    switchboard.close()


@pytest.mark.parametrize(
    ("environment", "arguments", "says"),
    [
        ({"SLURM_STEP_NUM_NODES": "3"}, [], "launch.nodes = 2, but this Slurm step has 3 nodes; ask for 2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, [], "has 4 tasks; start one on each node (srun --ntasks-per-node=1)"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, [], "has 4 tasks; start one on each node"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ["-s", "launch.nodes=1"], "launch.nodes = 1, but this Slurm step has 8 tasks"),
        (
            {"SLURM_NODEID": "2"},
            [],
            "launch.nodes = 2, but this is node rank 2 (--node-rank, or SLURM_NODEID); set launch.nodes",
        ),
        ({"SLURM_NODEID": "1"}, ["-s", "launch.nodes=1"], "launch.nodes = 1, but this is node rank 1"),
    ],
)
def test_a_step_of_another_shape_is_refused(tmp_path, environment, arguments, says):
    settings = ["-s", f"run.dir={tmp_path / 'run'}", "-s", "launch.nodes=2"]
    command = [sys.executable, "-m", *TRAIN, *settings, *arguments]
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
        start_new_session=True,  # tasks of Slurm have no terminal
    )
    assert told.returncode == 2 and says in told.stderr and told.stderr.count("\n") == 1
    # A notebook or an editor that was started in a step has its variables too.
    way_out = (
        "--node-rank 0" if "SLURM_NODEID" in environment else "env -u SLURM_STEP_NUM_NODES -u SLURM_STEP_NUM_TASKS"
    )
    assert way_out in told.stderr
    assert not (tmp_path / "run").exists()


def test_in_the_shell_of_a_step_one_process_is_one(tmp_path):
    """As `srun --ntasks=8 --pty bash` gives: a step of 8 tasks, and a terminal. An allocation of 8 tasks means nothing."""
    ask = "from pathlib import Path; from megatron_async_rlhf.config.load import load_config as load; "
    ask += "from megatron_async_rlhf.launch.nodes import check_node_rank; "
    ask += f"check_node_rank(load(Path({str(TINY)!r})), 0); print('let in')"
    script = ["script", "--quiet", "--return", "--command", shlex.join([sys.executable, "-c", ask]), "/dev/null"]
    for command, variable in ((script, "SLURM_STEP_NUM_TASKS"), ([sys.executable, "-c", ask], "SLURM_NTASKS")):
        environment = {**os.environ, variable: "8"}
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, start_new_session=True
        )
        assert told.stdout.strip() == "let in", told.stdout


def test_a_job_submitted_from_within_a_step_is_not_that_step(monkeypatch):
    """sbatch hands the environment on."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    check_node_rank(load_config(TINY), 0)
