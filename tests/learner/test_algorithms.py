"""Every algorithm on real ranks: as a loop without Megatron trains, the same in every layout, and from a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from algorithm_cases import (
    ALONE,
    CASES,
    LAYOUTS,
    LEARNER,
    LONGEST,
    ONE,
    OWN,
    SAVED,
    SHARED,
    STEPS,
    cases_in,
    make_rollouts,
    own_loss,
    rollouts_of,
    section_of,
    write_models,
)
from learner_ranks import CONTEXT_LENGTH, TEMPERATURE, VOCAB_SIZE, Layout, run_worker
from plain_training import PlainLearner, completion_logprobs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_async_rlhf.config.algorithms import BestOfNSection
from megatron_async_rlhf.config.metrics import metric_names, possible_metrics
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.holdings import learner_holdings, value_holdings
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.flops import forward_flops
from megatron_async_rlhf.models.layout import LearnerLayout

WORKER = Path(__file__).with_name("algorithm_worker.py")
TIMEOUT_S = 300
PEAK_TFLOPS = 0.5


class Trained:
    """What all ranks of all layouts wrote, and what they were told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = write_models(root)
        self.rollouts = make_rollouts(self.models["policy"])
        self.configs = {name: self._config(name) for name in (*CASES, *ALONE, *SHARED, *OWN)}
        names = [ONE, *LAYOUTS]
        job = {
            "config": {
                "learner": LEARNER | {"micro_batch_tokens": 3 * CONTEXT_LENGTH, "timeout_s": 60, "peak_tflops": PEAK_TFLOPS},
                "generator": {"temperature": TEMPERATURE, "max_new_tokens": LONGEST},
                "weights": {"timeout_s": 30},
                "algorithm": {},
                "schedule": {},
            },
            "policy": self.models["policy"],
            "cases": {
                name: {"config": config, "commands": self.commands(name), "saved": name in SAVED}
                for name, config in self.configs.items()
            },
            "layouts": [
                {
                    "name": str(layout),
                    "before": str(names[i - 1]) if i else None,
                    "cases": list(self.configs) if layout == ONE else cases_in(layout),
                    "learner": layout.keys
                    | {"tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline, "ranks": layout.ranks},
                }
                for i, layout in enumerate(names)
            ],
        }  # fmt: skip
        run_worker(WORKER, root, job, TIMEOUT_S)
        self._results = {layout: [self._read(layout, rank) for rank in range(layout.ranks)] for layout in names}

    def case(self, name: str) -> dict:
        return CASES[(ALONE | SHARED | OWN).get(name, name)]

    def commands(self, name: str) -> list:
        return rollouts_of(self.case(name), self.rollouts)

    def ranks(self, layout: Layout, name: str, phase: str = "through") -> list[dict]:
        return [rank[name][phase] for rank in self._results[layout]]

    def refusals(self, layout: Layout) -> list[dict]:
        return [rank["refusals"] for rank in self._results[layout]]

    def result(self, layout: Layout, name: str, phase: str = "through") -> dict:
        return self.ranks(layout, name, phase)[0]

    def exported(self, layout: Layout, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / str(layout) / name / "model.safetensors")

    def _read(self, layout: Layout, rank: int) -> dict:
        return json.loads((self.root / f"{layout}-rank{rank}.json").read_text())

    def _config(self, name: str) -> dict:
        case = self.case(name)
        rollout = {} if case.get("once") else {"mini_batches": 2, "epochs": 2}
        schedule = {"mode": "sync", "steps": STEPS} | rollout
        algorithm = section_of(case, self.models) | (own_loss() if name in OWN else {})
        config = {"algorithm": algorithm, "schedule": schedule}
        learner = {"micro_batch_tokens": 1} if name in ALONE else {"share_prompts": True} if name in SHARED else {}
        return config | ({"learner": learner} if learner else {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("algorithms"))


@pytest.fixture(scope="module")
def plain(trained: Trained) -> dict[str, PlainLearner]:
    """Every case trained without Megatron, on one thread: two wait for each other where the cores have other work."""
    threads, learners = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for name in CASES:
        section = RunConfig.model_validate(
            {"model": {"hf": trained.models["policy"]}, **trained.configs[name]}
        ).algorithm
        learners[name] = PlainLearner(
            policy_hf=trained.models["policy"], algorithm=section.model_dump(mode="json"), keys=LEARNER,
            temperature=TEMPERATURE, total_steps=STEPS, longest=LONGEST,
        )  # fmt: skip
        for rollout, epochs in trained.commands(name):
            learners[name].train_rollout(rollout, epochs)
    torch.set_num_threads(threads)
    return learners


def assert_same_steps(ours: list[dict], theirs: list[dict], *, but: tuple[str, ...] = ()) -> None:
    """All of `theirs` but some metrics, to 1e-4; what is a sum of terms that nearly cancel, to 1e-5 of the largest."""
    assert len(ours) == len(theirs) >= 2
    largest = {key: max(abs(step.get(key, 0.0)) for step in theirs) for step in theirs for key in step}
    for number, (our_step, their_step) in enumerate(zip(ours, theirs, strict=True)):
        for key in their_step.keys() - set(but):
            close = pytest.approx(their_step[key], rel=1e-4, abs=1e-5 * max(1.0, largest[key]))
            assert our_step[key] == close, (number, key)


@pytest.mark.parametrize("name", CASES)
def test_one_rank_trains_as_a_loop_without_megatron(trained: Trained, plain: dict[str, PlainLearner], name: str):
    ours, theirs = trained.result(ONE, name)["steps"], plain[name].history
    has_reference = name not in ("best_of_n", "grpo_sequences")
    assert_same_steps(ours, theirs, but=() if has_reference else ("kl_to_reference",))
    assert all(("kl_to_reference" in step) == has_reference for step in ours if step["num_sequences"])
    norms = [step["grad_norm"] for step in theirs if step["num_sequences"]]
    assert max(norms) > LEARNER["clip_grad"], "clipping must matter"
    exported = trained.exported(ONE, name)
    for key, parameter in plain[name].policy.named_parameters():
        gap = (exported[key] - parameter).abs().max()
        assert gap <= 2e-4 * parameter.abs().max(), key


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ppo")])
def test_the_value_model_is_the_plain_loops(trained: Trained, plain: dict[str, PlainLearner], name: str):
    ours = torch.load(trained.root / str(ONE) / name / "values.pt")
    theirs = dict(plain[name].value.named_parameters())
    for key, their_key in {
        "output_layer.weight": "score.weight",
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.layers.1.mlp.linear_fc2.weight": "model.layers.1.mlp.down_proj.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
    }.items():
        gap = (ours[key] - theirs[their_key]).abs().max()
        assert gap <= 2e-4 * theirs[their_key].abs().max(), key
    assert ours["output_layer.weight"].shape == (1, 32)


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_the_configuration_tells_which_metrics_there_are(trained: Trained, name: str):
    """Those that `checkpoint.keep_best` can be; what is not of the algorithm comes from the controller, or is for all."""
    config = RunConfig.model_validate({"model": {"hf": trained.models["policy"]}, **trained.configs[name]})
    result = trained.result(ONE, name)
    reported = {metric for step in result["steps"] for metric in step} | {m for step in result["seconds"] for m in step}
    known = set(metric_names(config.algorithm, config.rewards))
    assert {metric for metric in reported - known if not metric.startswith("own/")} == set()
    others = metric_names(BestOfNSection(), config.rewards)
    assert known - reported - {*others, "time/proximal_s"} == set()


def test_the_cases_reach_what_they_are_about(trained: Trained):
    """Bounds that never act would be tested by nothing."""

    def most(name: str, key: str) -> float:
        return max(step.get(key, 0) for step in trained.result(ONE, name)["steps"])

    for name in ("proximal_rloo", "proximal_rloo_sampler", "ppo", "grpo", "grpo_sequences"):
        assert most(name, "ratio/clipped_low") > 0 and most(name, "ratio/clipped_high") > 0, name
    assert most("grpo_cispo", "ratio/clipped_high") > 0
    for name in ("rloo", "ppo", "ppo_value_hf_once", "grpo", "grpo_sequences"):
        assert 0 < most(name, "sampler/ratio_outside") < 1, name
    assert most("ppo", "value/clipped") > 0
    for name in ("rloo", "proximal_rloo", "ppo"):
        assert most(name, "kl_to_reference") > 0.01, name


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in cases_in(layout)], ids=str
)
def test_a_layout_trains_as_one_rank_does(trained: Trained, layout: Layout, name: str):
    ours, theirs = trained.result(layout, name), trained.result(ONE, name)
    assert [set(step) for step in ours["steps"]] == [set(step) for step in theirs["steps"]]
    assert_same_steps(ours["steps"], theirs["steps"], but=("padding",))
    our_weights, their_weights = trained.exported(layout, name), trained.exported(ONE, name)
    for key, tensor in their_weights.items():
        assert (our_weights[key] - tensor).abs().max() <= 2e-4 * tensor.abs().max(), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_reports_the_same(trained: Trained, layout: Layout):
    for name in cases_in(layout):
        first, *others = trained.ranks(layout, name)
        assert all(other["steps"] == first["steps"] for other in others)


@pytest.mark.parametrize("alone", ALONE)
def test_packed_sequences_train_as_each_does_alone(trained: Trained, alone: str):
    ours, theirs = trained.result(ONE, alone)["steps"], trained.result(ONE, ALONE[alone])["steps"]
    assert_same_steps(ours, theirs)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("layout", [ONE, *(layout for layout in LAYOUTS if layout.context == 1)], ids=str)
def test_a_shared_prompt_trains_as_one_for_each_completion_does(trained: Trained, layout: Layout, shared: str):
    ours, theirs = trained.result(layout, shared), trained.result(ONE, SHARED[shared])
    assert_same_steps(ours["steps"], theirs["steps"], but=("tokens", "padding"))
    assert all(
        step["tokens"] < of["tokens"] for step, of in zip(ours["steps"], theirs["steps"], strict=True) if "loss" in of
    )
    for our_rows, their_rows in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        for our_row, their_row in zip(our_rows, their_rows, strict=True):
            assert our_row == pytest.approx(their_row, abs=1e-4)
    for key, tensor in trained.exported(ONE, SHARED[shared]).items():
        gap = (trained.exported(layout, shared)[key] - tensor).abs().max()
        assert gap <= 2e-4 * tensor.abs().max(), key


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_a_loss_of_ones_own_trains_as_the_same_in_the_package_and_its_metrics_are_reduced_as_it_says(
    trained: Trained, layout: Layout
):
    ours, theirs = trained.result(layout, "grpo_own_loss")["steps"], trained.result(layout, "grpo")["steps"]
    for our_step, their_step in zip(ours, theirs, strict=True):
        common = {name: value for name, value in our_step.items() if not name.startswith("own/")}
        assert common == {name: value for name, value in their_step.items() if not name.startswith("ratio/")}
    for step, alone in zip(ours, trained.result(ONE, "grpo_own_loss")["steps"], strict=True):
        if "loss" in step:
            assert step["own/mean"] == 2.0
            assert step["own/real"] == 1.0, "micro-batches that keep ranks in step do not count"
            assert step["own/lowest"] < step["own/highest"] < 0.0
            for name in ("own/tokens", "own/highest", "own/lowest"):
                assert step[name] == pytest.approx(alone[name], rel=1e-4), name
    assert max(step.get("ratio/max", 0.0) for step in theirs) > 1.0


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_a_loss_of_ones_own_that_fails_on_one_rank_is_an_error_of_all(trained: Trained, layout: Layout):
    for rank in trained.refusals(layout):
        raised, other = rank["raises_on_the_last_rank"], rank["other_metrics"]
        assert raised["kind"] == other["kind"] == "LearnerError"
        assert "raises_on_the_last_rank raised IndexError: no such thing" in raised["message"]
        assert other["message"].startswith("the loss has other metrics in one micro-batch than in another: {")


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_a_mini_batch_without_groups_is_a_version_and_nothing_else(trained: Trained, layout: Layout):
    for rank in trained.ranks(layout, "grpo"):
        assert rank["version"] == len(rank["steps"]) == 12
        assert [step for step in rank["steps"] if "loss" not in step] == [{"num_sequences": 0.0}] * 2
    once = trained.result(ONE, "ppo_value_hf_once")
    assert once["steps"][4] == {"num_sequences": 0.0}
    assert once["logprobs"][4] == []


def test_the_answer_has_the_logprobs_before_the_first_update(trained: Trained):
    model = AutoModelForCausalLM.from_pretrained(trained.models["policy"], dtype=torch.float32)
    (rollout, _), *_ = trained.commands("ppo")
    rows = [row for group in rollout[0] for row in group["sequences"]]
    answered = trained.result(ONE, "ppo")["logprobs"][0]
    for row, ours in zip(rows, answered, strict=True):
        theirs = completion_logprobs(model, tuple(row), TEMPERATURE).tolist()
        assert ours == pytest.approx(theirs, abs=1e-4)


def passes_of(trained: Trained, name: str) -> set[str]:
    return set(trained.result(ONE, name)["spans"][0]) & {"reference", "proximal", "values"}


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("online_dpo", {"reference"}),
        ("best_of_n", set()),
        ("rloo", {"reference", "proximal"}),  # KL in the reward
        ("rloo_decoupled_once", {"reference"}),  # one update: the training pass knows the proximal policy
        ("ppo", {"reference", "proximal", "values"}),
        ("ppo_value_hf_once", {"reference", "values"}),
        ("grpo", {"reference", "proximal"}),  # several updates
        ("grpo_sequences", {"proximal"}),  # no KL
        ("grpo_cispo", {"reference"}),  # the ratio is to the sampler
    ],
)
def test_only_the_passes_that_are_needed_are_made(trained: Trained, name: str, needed: set[str]):
    assert passes_of(trained, name) == needed


@pytest.mark.parametrize(
    ("name", "passes", "value_passes"), [("online_dpo", 3 + 1 / 2, 0), ("ppo", 3 + 2 / 2, 3 + 1 / 2)]
)
def test_utilisation_counts_the_passes_that_were_made(trained: Trained, name: str, passes: float, value_passes: float):
    """Of each update; one pass before serves two epochs."""
    commands, measured = trained.commands(name), trained.result(ONE, name)["utilisation"][0]
    rows = [row for groups in commands[0][0] for group in groups for row in group["sequences"]]
    arch = architecture_of_hf(Path(trained.models["policy"]))
    lengths, outputs = [len(ids) - 1 for ids, _ in rows], sum(len(ids) - prompt for ids, prompt in rows)
    flops = passes * forward_flops(arch, lengths, outputs) + value_passes * forward_flops(arch, lengths, 0)
    seconds = sum(v for k, v in measured.items() if k.startswith("time/") and k != "time/gradient_reduction_s")
    # Two mini-batches: each step is half of all sequences, on average.
    assert measured["model_flops_utilisation"] == pytest.approx(flops / 2 / (seconds * PEAK_TFLOPS * 1e12))
    assert measured["tokens_per_s"] == pytest.approx(sum(lengths) / 2 / seconds)
    assert ("time/values_s" in measured) == (name == "ppo")


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_the_memory_estimate_counts_the_value_models_numbers(trained: Trained, layout: Layout):
    arch = architecture_of_hf(Path(trained.models["policy"]))
    held = LearnerLayout(
        tensor_parallel=layout.tensor, pipeline_parallel=layout.pipeline, data_parallel=layout.data * layout.context
    )
    stages = zip(learner_holdings(arch, held), value_holdings(arch, held), strict=True)
    expected = [[policy.total, value.total] for policy, value in stages]
    ranks = trained.ranks(layout, "ppo")
    first_of_stages = ranks[:: len(ranks) // layout.pipeline]
    assert [rank["numbers"] for rank in first_of_stages] == expected
    assert trained.result(layout, "grpo")["numbers"] == expected[0][:1]


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_the_same_layout_goes_on_bit_for_bit(trained: Trained, layout: Layout, name: str):
    through, resumed = trained.ranks(layout, name), trained.ranks(layout, name, "resumed")
    for whole, rest in zip(through, resumed, strict=True):
        assert whole["changed"]
        assert rest["steps"] == whole["steps"][-len(rest["steps"]) :]
        assert 0 < len(rest["steps"]) < len(whole["steps"])
        for key in ("weights", "values", "adam", "rates", "version"):
            assert rest[key] == whole[key], key
        assert bool(rest["values"]) == name.startswith("ppo")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_another_layout_goes_on_closely(trained: Trained, layout: Layout, name: str):
    theirs = trained.result(ONE, name)["steps"]
    ours = trained.result(layout, name, "from another layout")["steps"]
    assert_same_steps(ours, theirs[-len(ours) :], but=("padding",))


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_a_value_model_that_is_not_finite_changes_no_weight_of_either(trained: Trained, layout: Layout):
    for rank in trained.refusals(layout):
        error, version = rank["value model"]
        assert error["kind"] == "NonFiniteLossError"
        assert error["message"].startswith("step 2, value model: loss ")
        assert version == 1
        assert rank["same"]


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
def test_a_correction_without_the_samplers_logprobs_is_refused(trained: Trained, layout: Layout):
    for rank in trained.refusals(layout):
        error, version = rank["sampler"]
        assert error["kind"] == "LearnerError" and "algorithm.correction" in error["message"]
        assert version == 0
        assert rank["nothing"] == [None, 0]


def test_the_models_are_far_from_each_other(trained: Trained):
    """Else a value model that starts from the wrong one would not be noticed."""
    policy, reward = (load_file(Path(trained.models[name]) / "model.safetensors") for name in ("policy", "reward"))
    assert (policy["model.norm.weight"] - reward["model.norm.weight"]).abs().max() > 0.1
    assert reward["score.weight"].abs().max() > 0.1
    assert policy["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 32)


def test_every_name_of_every_algorithm_is_documented_and_reported(trained: Trained):
    reported = {name for case in trained.configs for name in trained.result(ONE, case)["names"] if case not in OWN}
    assert reported == {key.name for key in possible_metrics() if key.source == "learner"}
