"""What a learner saved, a learner of the same layout continues from bit for bit, one of another layout closely."""

import json
from pathlib import Path

import pytest
import torch
from learner_ranks import (
    BETA,
    CONTEXT_LENGTH,
    REINFORCEMENT,
    TEMPERATURE,
    WARM_START,
    Layout,
    make_pairs,
    make_sequences,
    run_worker,
)
from safetensors.torch import load_file

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.formats.checkpoint_weights import CheckpointWeights
from megatron_async_rlhf.models.architecture import architecture_of

WORKER = Path(__file__).with_name("checkpoint_worker.py")
TIMEOUT_S = 240
SHAPE = {
    "layers": 4, "hidden_size": 32, "ffn_size": 48, "heads": 4, "kv_heads": 2, "context_length": CONTEXT_LENGTH,
    "init_std": 0.2, "tie_embeddings": True,
}  # fmt: skip
VOCAB_SIZE = 37
ONE = Layout()
GRID = Layout(tensor=2, pipeline=2)
# Tied embeddings on several stages, and small buckets over three ranks: both leave padding inside a gradient buffer.
DIVIDED = Layout(pipeline=2, data=2, distributed_optimizer=True)
DIVIDED_GRID = Layout(tensor=2, data=2, distributed_optimizer=True)
INTERLEAVED = Layout(pipeline=2, virtual_stages=2, reference="swapped")
LATE = Layout(data=3, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
BF16 = Layout(precision="bf16")
DIVIDED_BF16 = Layout(data=2, distributed_optimizer=True, precision="bf16")
SAVED = [ONE, GRID, DIVIDED, INTERLEAVED, LATE, BF16, DIVIDED_BF16]
NORMS = Layout(pipeline=2, precision="bf16")
KINDS = [("local", "engine"), ("engine", "local"), ("engine", "engine"), ("old", "local"), ("old", "engine")]
CHANGES = [
    (GRID, ONE),
    (ONE, GRID),
    (DIVIDED, ONE),
    (ONE, DIVIDED),
    (DIVIDED, DIVIDED_GRID),
    (INTERLEAVED, GRID),
    (DIVIDED, INTERLEAVED),
    (LATE, ONE),
    (BF16, DIVIDED_BF16),
    (DIVIDED_BF16, BF16),
]


def phase(name: str, layout: Layout, **what: str | float) -> dict:
    sizes = {"tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline, "ranks": layout.ranks}
    buckets = {"bucket_size": 3000} if layout.overlap_grad_reduce else {}  # else these models have one
    return {"name": name, "learner": sizes | layout.keys, **buckets, **what}


class Ranks:
    """What all phases wrote."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        phases = []
        for layout in SAVED:
            phases.append(phase(f"{layout}", layout, save=str(directory / "saved" / str(layout))))
            for version in (1, 2):
                source = str(directory / "saved" / str(layout) / str(version))
                phases.append(phase(f"{layout} from {version}", layout, resume=source))
        for source, target in CHANGES:
            saved = str(directory / "saved" / str(source) / "2")
            phases.append(phase(f"{source} to {target}", target, resume=saved))
        saved = str(directory / "saved/offloaded")
        phases.append(phase("offloaded", DIVIDED_BF16, save=saved, offload=0.5))
        for version in (1, 2):
            resumed = f"offloaded from {version}"
            phases.append(phase(resumed, DIVIDED_BF16, resume=f"{saved}/{version}", offload=0.5))
        phases.append(phase("offloaded to whole", BF16, resume=f"{saved}/2"))
        for layers in dict(KINDS):
            saved = str(directory / "saved" / layers)
            phases.append(phase(layers, NORMS, save=saved, layers=layers, family="qwen3"))
        for layers, others in KINDS:
            source = str(directory / "saved" / layers / "2")
            phases.append(phase(f"{layers} to {others}", NORMS, resume=source, layers=others, family="qwen3"))
        config = {
            "learner": REINFORCEMENT | {"micro_batch_tokens": 2 * CONTEXT_LENGTH, "timeout_s": 60},
            "warm_start": WARM_START,
            "generator": {"temperature": TEMPERATURE},
            "schedule": {"steps": 5},
            "weights": {"timeout_s": 30},
            "algorithm": {"beta": BETA},
        }
        job = {
            "config": config, "model": {"section": SHAPE, "vocab_size": VOCAB_SIZE}, "phases": phases,
            "sequences": make_sequences(), "pairs": make_pairs(),
        }  # fmt: skip
        run_worker(WORKER, directory, job, TIMEOUT_S)

    def results(self, name: object) -> list[dict]:
        paths = sorted(self.directory.glob(f"{name}-rank*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def weights(self, name: object) -> dict[str, torch.Tensor]:
        return load_file(self.directory / f"{name}" / "model.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_the_same_layout_goes_on_bit_for_bit(ranks: Ranks, layout: Layout, version: int):
    """Version 1 was saved before the optimizer's first step, version 2 while version 3 was being trained."""
    through, resumed = ranks.results(layout), ranks.results(f"{layout} from {version}")
    assert len(through) == len(resumed) == layout.ranks
    for whole, rest in zip(through, resumed, strict=True):
        assert rest["resumed at"] == version
        assert rest["metrics"] == whole["metrics"][version:]
        for key in ("weights", "adam", "rates", "version"):
            assert rest[key] == whole[key], key
        assert all("exp_avg" in state for state in rest["adam"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_an_optimizer_is_gone_before_the_next_one_is_built(ranks: Ranks, layout: Layout):
    """Else both were in memory at once, which no estimate counts."""
    assert [result["held of the optimizer before"] for result in ranks.results(layout)] == [0] * layout.ranks


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), KINDS)
def test_layers_of_another_kind_go_on_bit_for_bit(ranks: Ranks, source: str, target: str):
    """Local ones and those with Transformer Engine's modules, in a model with all the norms there are; and what version
    0.1.0 saved, where norms had no extra state."""
    saved, resumed = ranks.results(source), ranks.results(f"{source} to {target}")
    assert len(saved) == len(resumed) == NORMS.ranks
    for before, after in zip(saved, resumed, strict=True):
        assert len(before["saved"]["weights"]) == len(before["saved"]["adam"]) > 10
        for key in ("weights", "adam"):
            assert after["loaded"][key] == before["saved"][key], key
        assert after["metrics"][0]["loss"] == before["metrics"][2]["loss"]
        assert bool(after["loaded"]["scales"]) == (source == target == "engine")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_an_offloaded_optimizer_goes_on_bit_for_bit(ranks: Ranks, version: int):
    for whole, rest in zip(ranks.results("offloaded"), ranks.results(f"offloaded from {version}"), strict=True):
        assert rest["metrics"] == whole["metrics"][version:]
        for key in ("weights", "adam", "rates", "version"):
            assert rest[key] == whole[key], key
        assert all("master_param" in state for state in rest["adam"])


@pytest.mark.slow
def test_an_offloaded_optimizer_goes_on_where_nothing_is_offloaded(ranks: Ranks):
    (whole,), (offloaded, _) = ranks.results("offloaded to whole"), ranks.results("offloaded")
    for ours, theirs in zip(whole["metrics"], offloaded["metrics"][2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_every_ranks_random_numbers_go_on(ranks: Ranks, layout: Layout):
    drawn = [result["random"] for result in ranks.results(layout)]
    assert len({tuple(numbers) for numbers in drawn}) == layout.ranks
    assert [result["random"] for result in ranks.results(f"{layout} from 2")] == drawn


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), CHANGES, ids=str)
def test_another_layout_goes_on_closely(ranks: Ranks, source: Layout, target: Layout):
    through, resumed = ranks.results(source)[0], ranks.results(f"{source} to {target}")
    assert len(resumed) == target.ranks
    for rest in resumed:
        assert (rest["resumed at"], rest["version"], rest["rates"]) == (2, 4, through["rates"])
        for ours, theirs in zip(rest["metrics"], through["metrics"][2:], strict=True):
            for key in ("loss", "grad_norm", "learning_rate", "kl_to_reference"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    ours, theirs = ranks.weights(f"{source} to {target}"), ranks.weights(source)
    before = load_file(ranks.directory / "saved" / str(source) / "2/exported/model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if tensor.dtype == torch.bfloat16:  # rounded from float32 ones: here and there to the other side
            assert (ours[name] != tensor).float().mean() <= 0.01, name
            continue
        gap, moved = (ours[name] - tensor).abs().max(), (tensor - before[name]).abs().max()
        assert gap <= 1e-5 * tensor.abs().max(), name
        assert gap <= 0.02 * moved, name  # what two steps without Adam's state would not keep


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_the_weights_in_it_are_those_of_its_version(ranks: Ranks, layout: Layout):
    """Read as `export-hf` reads them: the optimizer's entries beside them are ignored."""
    saved = ranks.directory / "saved" / str(layout) / "2"
    arch = architecture_of(ModelSection(**SHAPE), VOCAB_SIZE)
    reader = CheckpointWeights(saved / "checkpoint", arch)
    expected = load_file(saved / "exported/model.safetensors")
    assert set(reader.tensors) == set(expected)
    for name, tensor in expected.items():
        matrix = torch.empty(reader.tensors[name].matrix, dtype=tensor.dtype)
        reader.read_into(matrix, name, 0, 0)
        assert torch.equal(matrix.view(tensor.shape), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_a_file_that_cannot_be_written_fails_every_rank_and_is_named(ranks: Ranks, layout: Layout):
    for result in ranks.results(layout):
        blocked = ranks.directory / "saved" / str(layout) / "blocked/checkpoint"
        assert result["error"].startswith(f"checkpoint {blocked} could not be written (learner.0: IsADirectoryError")
    assert (ranks.directory / "saved" / str(layout) / "after the error/checkpoint/metadata.json").is_file()
    assert not (blocked / "metadata.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_a_full_disk_fails_every_rank_alike_whichever_file_it_meets(ranks: Ranks, layout: Layout):
    """All ranks are still there for the next command: the saves after it are those of the tests above."""
    for result in ranks.results(layout):
        root = ranks.directory / "saved" / str(layout) / "full"
        for name in ("common.pt", "__0_0.distcp", ".metadata.tmp", "metadata.json"):
            told = result["full"].pop(name)
            assert told.startswith(f"checkpoint {root / name}/checkpoint could not be written (learner.0: "), told
            assert told.endswith("No space left on device); make room there, then continue with --resume"), told
        place = root / "shard-0.partial/checkpoint"
        told = "cannot be written (No space left on device); make room there, then continue with --resume"
        assert result["full"] == {"shard-0.partial": f"{place} {told}"}
        assert not list(place.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [BF16, DIVIDED_BF16], ids=str)
def test_an_optimizer_of_other_weights_is_refused(ranks: Ranks, layout: Layout):
    checkpoint = ranks.directory / "saved" / str(layout) / "after the error/checkpoint"
    for result in ranks.results(layout):
        assert result["moved"].startswith(f"{checkpoint}: the float32 weights of its optimizer are not those")
        assert result["moved"].endswith(f"model.hf = {checkpoint}")
