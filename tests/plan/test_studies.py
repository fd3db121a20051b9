"""docs/studies.md: what the tool says of the paper's run, and that the page has it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from study_8b import PAPER_SAVING, SCALES, Zero3, paper_split, planned, reached_on_gpu  # noqa: E402

CONTENT = json.loads((ROOT / "docs/results/simulated_8b.json").read_text(encoding="utf-8"))


def test_the_paper_s_saving_is_predicted():
    """Within five points of the published one; the page's figures are those of the code."""
    for name, found in (("paper", paper_split(Zero3())), ("paper_as_reached", paper_split(Zero3(), reached_on_gpu))):
        assert abs(found["saving"] - PAPER_SAVING) <= 0.05
        for key in ("train_seconds", "generate_seconds", "sync_seconds", "async_seconds", "saving"):
            assert found[key] == pytest.approx(CONTENT[name][key], rel=1e-6)


def test_the_learner_of_the_paper_waits_for_weights_or_computes():
    """By hand: 32 sequences a rank; 48.2 ms to gather 16.06 GB over six sevenths of 315 GB/s."""
    import math

    from megatron_async_rlhf.config.load import load_config
    from megatron_async_rlhf.estimate.machines import machine_of
    from megatron_async_rlhf.simulate.prediction import shape_of

    config = load_config(ROOT / "examples/llama8b_async.yaml", [f"model.hf={ROOT / 'examples/llama8b'}"])
    arch = shape_of(config)
    gather = 2 * 8.03e9 * 6 / 7 / 315e9
    forward = 436 * 2 * 8.03e9 / (0.45 * 989e12)
    by_hand = 32 * 3 * max(gather, forward) + 16 * max(8 * forward, 4 * gather)
    assert math.isclose(Zero3().step_s(arch, machine_of(config)), by_hand, rel_tol=0.03)


def test_the_page_has_the_best_split():
    small = planned(8, CONTENT["workloads"][0]["prompts"], Zero3(), samples=2, epochs=1)
    for kind, plan in CONTENT["workloads"][0]["plans"].items():
        assert small["plans"][kind]["step_seconds"] == pytest.approx(plan["step_seconds"], rel=1e-6)
    assert [row["gpus"] for row in CONTENT["scales"]] == list(SCALES)
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    for row in (*CONTENT["workloads"], *CONTENT["scales"]):
        for plan in row["plans"].values():
            assert f"{plan['step_seconds']:.2f} s" in page
