"""What the planner finds against what every single layout would give, and against the rules that a run is held to."""

import contextlib
import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import run_memory
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.formats import hub_snapshot
from megatron_async_rlhf.launch.layout import lay_out
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.models.layout_rules import check_layouts
from megatron_async_rlhf.plan.analytic import Workload, step_times
from megatron_async_rlhf.plan.layouts import with_keys
from megatron_async_rlhf.plan.search import KINDS, Plan, _candidates, devices_of, find_plans, step_seconds
from megatron_async_rlhf.simulate.prediction import shape_of
from megatron_async_rlhf.usage import run_command_line

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "examples" / "llama8b_async.yaml"
SMALLER = "schedule.prompts_per_step=32"  # a quarter


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch):
    """The paper's task with a quarter of its prompts and with overrides, and the model's shape."""
    monkeypatch.chdir(ROOT)

    def task(*overrides: str):
        config = load_config(LLAMA, [SMALLER, *overrides])
        return config, shape_of(config)

    return task


def plans_of(task, *overrides: str, best: int = 2) -> list[Plan]:
    config, arch = task(*overrides)
    return find_plans(config, arch, best=best)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """Two of each kind for the task as it stands."""
    with contextlib.chdir(ROOT):
        config = load_config(LLAMA, [SMALLER])
        return find_plans(config, shape_of(config), best=2)


def test_every_plan_is_one_that_a_run_takes(plans: list[Plan]):
    assert [plan.kind for plan in plans] == [kind for kind in KINDS for _ in range(2)]
    for plan in plans:
        assert_a_run_takes(plan)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["launch.nodes=2"], marks=pytest.mark.thorough),
        pytest.param(["launch.gpu=a100", "generator.max_new_tokens=256"], marks=pytest.mark.thorough),
        ["algorithm={type: ppo}"],
    ],
)
def test_every_plan_of_another_task_is_one_that_a_run_takes(task, overrides: list[str]):
    for plan in plans_of(task, *overrides):
        assert_a_run_takes(plan)


def assert_a_run_takes(plan: Plan) -> None:
    config, arch = RunConfig.model_validate(plan.config.model_dump()), shape_of(plan.config)
    check_layouts(config, arch)
    lay_out(config, planned_nodes(config), config.generator.replicas)
    assert config.gpus <= devices_of(config)
    memory, room = run_memory(config, arch), config.launch.gpu_memory * GIB
    assert 1.15 * memory.largest_rank <= room and memory.generator.total <= room
    assert memory.generator.sequences >= 1


def test_no_layout_is_faster_than_the_best_candidate(task):
    """Of all that eight devices allow, tried one by one without the planner's own enumeration."""
    config, arch = task()
    found = list(_candidates(config, arch, Workload()))
    for kind in KINDS:
        best = min(candidate.step_s(kind) for candidate in found)
        others = []
        for tensor, pipeline, workers in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)):
            for ranks in range(tensor * pipeline, 8, tensor * pipeline):
                replicas = (8 - config.reward_workers - ranks) // workers
                if replicas < 1:
                    continue
                several = ranks > tensor * pipeline
                for size, recompute in itertools.product((2048, 4096, 8192, 16384), ("none", "selective", "full")):
                    keys = {
                        "tensor_parallel": tensor, "pipeline_parallel": pipeline, "ranks": ranks,
                        "sequence_parallel": tensor > 1, "distributed_optimizer": several, "overlap_grad_reduce": several,
                        "micro_batch_tokens": size, "recompute": recompute,
                    }  # fmt: skip
                    generator = {
                        "tensor_parallel": workers,
                        "replicas": replicas,
                        "max_concurrent": -(-256 // replicas),
                    }
                    other = with_keys(with_keys(config, "learner", keys), "generator", generator)
                    try:
                        check_layouts(other, arch)
                    except ConfigError:
                        continue
                    if 1.15 * run_memory(other, arch).largest_rank > 80 * GIB:
                        continue
                    times, _ = step_times(other, arch, Workload())
                    others.append({"one_step": times.one_step, "bounded": times.bounded, "sync": times.in_turns}[kind])
        assert len(others) > 50
        assert best <= min(others) + 1e-9


def test_more_devices_are_never_slower(task):
    steps = [
        min(c.step_s("one_step") for c in _candidates(*task(f"launch.nodes={nodes}"), Workload()))
        for nodes in (1, 2, 4, 8)
    ]
    assert steps == sorted(steps, reverse=True)


def test_each_kind_has_the_schedule_that_it_is_named_after(task, plans: list[Plan]):
    fastest = {plan.kind: plan for plan in reversed(plans)}
    schedules = {kind: plan.config.schedule for kind, plan in fastest.items()}
    assert [schedules[kind].staleness_bound for kind in KINDS] == [1, 4, 0]
    assert [schedules[kind].generation for kind in KINDS] == ["batch", "streaming", "batch"]
    # Places are never empty where the next completion may begin at once.
    assert step_seconds(fastest["bounded"]) <= step_seconds(fastest["one_step"]) <= step_seconds(fastest["sync"])
    own = ("schedule.generation=streaming", "schedule.in_flight_updates=keep", "schedule.max_staleness=7")
    (bounded,) = (plan for plan in plans_of(task, *own, best=1) if plan.kind == "bounded")
    assert (bounded.config.schedule.max_staleness, bounded.config.schedule.in_flight_updates) == (7, "keep")


def test_a_thousand_devices_are_planned(task):
    """What is simulated does not grow with their number."""
    first = plans_of(task, "launch.nodes=128", "schedule.prompts_per_step=2048", best=1)[0]
    assert first.config.gpus > 512 and first.config.generator.replicas > 16


def test_a_plan_for_one_kind_of_gpu_is_faster_on_a_faster_one(task, plans: list[Plan]):
    h100, b200 = plans[0], plans_of(task, "launch.gpu=b200", best=1)[0]
    assert h100.config.launch.gpu == "h100"
    assert b200.prediction.schedule.step_s < h100.prediction.schedule.step_s


def test_what_fits_nowhere_is_refused_with_the_least_change(task):
    with pytest.raises(ConfigError) as refused:
        plans_of(
            task,
            "launch.gpu_memory_gib=24",
            "launch.gpus_per_node=2",
            "generator.replicas=1",
            "learner.ranks=1",
            "learner.tensor_parallel=1",
            "learner.sequence_parallel=false",
            "reward={type: gsm8k}",
        )
    message = str(refused.value)
    assert message.startswith(
        "nothing fits: 8.0 billion parameters on 2 devices of 24 GiB: divided by tensor_parallel = "
    )
    assert "it fits launch.nodes = " in message and "\n" not in message


def planned_on(*options: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """What the command says of the paper's task, whose own layout takes eight GPUs: exit code and output."""
    code = run_command_line(app, ["plan", str(LLAMA), "-s", SMALLER, "--best", "1", "--json", *options])
    return code, "".join(capsys.readouterr())


def test_the_layout_that_a_plan_replaces_need_not_fit_the_machines(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, shown = planned_on("--gpus-per-node", "4", "--gpu", "h200", capsys=capsys)
    assert code == 0 and {sum(plan["devices"].values()) for plan in json.loads(shown)} == {4}, shown
    code, shown = planned_on("--gpus-per-node", "2", "--gpu", "a100", capsys=capsys)
    assert code == 2 and shown.count("\n") == 1, shown
    assert "on 2 devices of 80 GiB" in shown and "it fits launch.nodes = 2 (4 devices)" in shown


def test_one_shared_gpu_leaves_nothing_to_plan(task):
    one = (
        "learner.tensor_parallel=1",
        "learner.sequence_parallel=false",
        "generator.replicas=1",
        "launch.gpus_per_node=1",
    )
    config, arch = task("weights.transport=ipc", *one)
    with pytest.raises(ConfigError, match="weights.transport = ipc: learner and generator share one GPU"):
        find_plans(config, arch, best=1)


def test_programs_read_json(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hub_snapshot, "_download", lambda *given: ROOT / "examples" / "llama8b")
    options = ["-s", "model.hf=org/llama", "--json", "--best", "2", "--out", str(tmp_path / "plan.yaml")]
    result = CliRunner().invoke(app, ["plan", str(LLAMA), *options])
    assert result.exit_code == 0, result.output
    plans = json.loads(result.output)
    assert [plan["schedule"] for plan in plans] == [kind for kind in KINDS for _ in range(2)]
    for plan in plans:
        assert plan["step_seconds"] > 0 and set(plan["idle"]) == {"learner", "generators"}
        assert plan["hours"] == pytest.approx(plan["step_seconds"] * 390 / 3600)
        assert 0 <= plan["staleness"]["mean"] <= plan["staleness"]["bound"]
        devices = plan["devices"]
        assert sum(devices.values()) == 8 and min(devices.values()) >= 0
    assert plans[0]["step_seconds"] <= plans[1]["step_seconds"]
    assert load_config(tmp_path / "plan.yaml").model.hf == Path("org/llama"), "and not where this machine has it"
    assert run_command_line(app, ["train", str(tmp_path / "plan.yaml"), "--dry-run"]) == 0


def test_people_read_a_table_of_eighty_columns_or_a_page(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "plans.html"
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", str(LLAMA), "--best", "1", "--page", str(page)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].strip() == "predicted for 8 devices"
    assert [line.split()[0] for line in lines[2:5]] == ["one", "bounded", "sync"]
    assert all(len(line) <= 80 for line in lines[:5])
    assert "assumed, not measured: prompts of 256 and completions of 512 tokens" in result.output.replace("\n", " ")
    told = page.read_text()
    assert "Assumed, not measured: prompts of 256 and completions of 512 tokens" in told
    assert f"<td>{lines[2].split()[-1]}</td>" in told  # the same figures
