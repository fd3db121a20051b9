"""Pushes between real Megatron ranks and real vLLM servers: bytes, log-probabilities, and every way to fail."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from push_rig import PushRig, push_rig
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer
from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.learner.protocol import WaitUntilReady
from megatron_async_rlhf.models.hf_mapping import elements_held
from megatron_async_rlhf.scheduler.weight_sync import PushError

PUSHES = int(os.environ.get("ASYNC_RLHF_TEST_PUSHES", "3"))

# Each start of real servers takes half a minute; what others cover too is thorough.

LAYOUTS = [
    pytest.param((1, 1, 1), (2, 1), id="tp1-to-tp2"),
    pytest.param((2, 2, 4), (2, 1), id="tp2-pp2-to-tp2", marks=pytest.mark.thorough),  # test_runs.py has a whole run
    pytest.param((2, 1, 2), (1, 1), id="tp2-to-tp1", marks=pytest.mark.thorough),
    pytest.param((1, 2, 2), (2, 1), id="pp2-to-tp2", marks=pytest.mark.thorough),
    pytest.param((1, 1, 2), (1, 2), id="dp2-to-two-replicas", marks=pytest.mark.thorough),
]


def overrides(learner: tuple[int, int, int], generator: tuple[int, int]) -> list[str]:
    return [
        f"learner.tensor_parallel={learner[0]}",
        f"learner.pipeline_parallel={learner[1]}",
        f"learner.ranks={learner[2]}",
        f"generator.tensor_parallel={generator[0]}",
        f"generator.replicas={generator[1]}",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("learner", "generator"), LAYOUTS)
def test_generators_hold_the_learners_weights_after_every_push(tmp_path, learner, generator):
    async def run():
        async with push_rig(
            tmp_path, *overrides(learner, generator), "learner.learning_rate=0.003", "schedule.steps=100"
        ) as rig:
            previous = None
            minimum = 4 * generator[1] * elements_held(rig.run_inputs.architecture, generator[0])
            for version in range(PUSHES):
                report, _ = await rig.push(version)
                assert report.mismatches == []
                assert report.compared > 0
                assert report.wire_bytes == minimum
                assert [g.version for g in rig.generators] == [version] * generator[1]
                assert await rig.largest_logprob_gap() <= 1e-4
                weights = (rig.run_dir / "export/model.safetensors").read_bytes()
                assert weights != previous
                previous = weights
                await rig.change_weights()
            if generator[0] == 2:
                await rig.push(rig.version)
                check_a_running_generator_against_files(await rig.export(), rig.urls[0])

    asyncio.run(run())


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = [
    pytest.param(
        "qwen2", {"tie_word_embeddings": True}, (1, 1, 1), (1, 1), id="qwen2-tied", marks=pytest.mark.thorough
    ),
    pytest.param(
        "qwen2", {"tie_word_embeddings": True}, (2, 1, 2), (2, 1), id="qwen2-tied-tp2", marks=pytest.mark.thorough
    ),
    pytest.param("qwen3", {"head_dim": 64}, (1, 2, 2), (1, 1), id="qwen3", marks=pytest.mark.thorough),
    pytest.param(
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        (2, 2, 4),
        (2, 1),
        id="llama3.2",
        marks=pytest.mark.thorough,
    ),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "changes", "learner", "generator"), FAMILIES)
def test_every_family_arrives_in_vllm(tmp_path, family, changes, learner, generator):
    """Biases, query and key norms, tied embeddings and scaled rotary frequencies, against Transformers."""
    shape = {
        "vocab_size": 261, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases would start as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    make_byte_tokenizer(tmp_path / "hf")

    async def run():
        async with push_rig(tmp_path, f"model={{hf: {tmp_path / 'hf'}}}", *overrides(learner, generator)) as rig:
            for version in range(3):
                report, _ = await rig.push(version)
                assert report.mismatches == [] and report.compared > 0
                assert await rig.largest_logprob_gap() <= 1e-4
                await rig.change_weights()

    asyncio.run(run())


@pytest.mark.thorough  # the digests of every asynchronous run would tell
@pytest.mark.timeout(300)
@pytest.mark.parametrize("snapshot", [False, True])
def test_training_during_a_push_does_not_change_what_arrives(tmp_path, snapshot):
    """The generator is stopped in the middle of the push, long enough for an optimizer step to spoil the rest of it."""
    shape = ["model.layers=4", "model.hidden_size=256", "model.ffn_size=512", "model.heads=4", "model.kv_heads=2"]

    async def run():
        settings = [*shape, *overrides((2, 1, 2), (1, 1)), "weights.staging_mib=1", f"weights.snapshot={snapshot}"]
        async with push_rig(tmp_path, *settings) as rig:
            assert 4 * rig.run_inputs.architecture.num_parameters > 8 * 2**20  # several rounds
            await rig.push(0)
            await rig.change_weights()
            exported = await rig.export()
            await rig.weights.start(1, rig.generators)
            rig.signal("generator.0", signal.SIGSTOP)
            training = asyncio.create_task(rig.change_weights())
            await asyncio.sleep(3)
            assert training.done() is snapshot  # a snapshot frees the learner, otherwise its optimizer waits
            rig.signal("generator.0", signal.SIGCONT)
            await rig.weights.arrived()
            await training
            report, _ = await rig.weights.report()
            assert report.mismatches == [] and report.compared > 0
            assert rig.generators[0].version == 1 and rig.version == 2
            assert await rig.largest_logprob_gap(exported) <= 1e-4

            await rig.weights.offer(2)
            await rig.change_weights()
            assert not await rig.weights.start(2, rig.generators, offered=True), "the weights have changed"
            exported = await rig.export()
            await rig.weights.offer(3)
            assert await rig.weights.start(3, rig.generators, offered=True)
            await rig.change_weights()
            await rig.weights.arrived()
            report, _ = await rig.weights.report()
            assert report.mismatches == [] and report.compared > 0
            assert rig.generators[0].version == 3 and rig.version == 4
            assert await rig.largest_logprob_gap(exported) <= 1e-4
            assert await rig.largest_logprob_gap() > 1e-3

    asyncio.run(run())


def verify(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_async_rlhf", "verify-weights", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def check_a_running_generator_against_files(exported: Path, url: str) -> None:
    """What vLLM computes with, read back through oneDNN's packed matrices, against the learner's export."""
    result = verify(str(exported), url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("equal: ") and "negative zeros" in result.stdout
    spoil(exported / "model.safetensors", "model.layers.1.mlp.down_proj.weight")
    result = verify(url, str(exported))
    assert result.returncode == 1
    assert result.stdout.startswith("different: model.layers.1.mlp.down_proj.weight: rows 0 to 63, columns 48")
    assert f"{url} rank 1" in result.stdout
    result = verify("http://127.0.0.1:9", str(exported))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def spoil(file: Path, name: str) -> None:
    """Flip one bit of the tensor's last element."""
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    end = json.loads(raw[8 : 8 + size])[name]["data_offsets"][1]
    raw[8 + size + end - 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_generator_lost_in_a_push_costs_that_push_only(tmp_path):
    """One is killed: noticed at once. One is stopped, which looks like a cut link: noticed within the timeout."""
    limit = 6.0

    async def lose(rig: PushRig, name: str, number: int, *, within: float) -> None:
        await rig.change_weights()
        await rig.weights.start(rig.version, rig.generators)  # the learner has been told to send when its receiver goes
        rig.signal(name, number)
        began = time.monotonic()
        with pytest.raises(PushError) as error:
            await rig.weights.arrived()
        assert time.monotonic() - began < within
        assert "\n" not in str(error.value)
        assert name in str(error.value)
        # They may hold parts of two versions, so they are at none.
        assert {generator.version for generator in rig.generators} == {-1}
        await next(generator for generator in rig.generators if generator.name == name).close()
        rig.generators = [generator for generator in rig.generators if generator.name != name]
        assert [receiver.name for receiver in error.value.gone] == [name]

        await rig.learner.execute(WaitUntilReady())
        await rig.change_weights()
        report, _ = await rig.push(rig.version)
        assert report.mismatches == [] and report.compared > 0
        assert {generator.version for generator in rig.generators} == {rig.version}
        assert await rig.largest_logprob_gap() <= 1e-4

    async def run():
        layout = overrides((2, 1, 2), (1, 3))
        async with push_rig(tmp_path, *layout, f"weights.timeout_s={limit}", "weights.staging_mib=1") as rig:
            await rig.push(0)
            await lose(rig, "generator.1", signal.SIGKILL, within=5)
            await lose(rig, "generator.2", signal.SIGSTOP, within=2 * limit + 6)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_generator_with_another_config_is_refused_by_name(tmp_path):
    async def run():
        layout = overrides((1, 1, 1), (1, 2))
        wider = {"generator.1": {"intermediate_size": 128}}
        async with push_rig(tmp_path, *layout, "weights.timeout_s=10", alter=wider) as rig:
            began = time.monotonic()
            with pytest.raises(
                PushError, match="generator.1 rank 0 planned another transfer than learner rank 0"
            ) as error:
                await rig.push(0)
            assert time.monotonic() - began < 10
            assert [generator.version for generator in rig.generators] == [-1, -1]

            # The learner and the other generator continue as if nothing had been.
            assert list(error.value.gone) == rig.generators[1:]
            await rig.generators.pop().close()
            report, _ = await rig.push(0)
            assert report.mismatches == [] and rig.generators[0].version == 0
            assert await rig.largest_logprob_gap() <= 1e-4

            # The same server, told to expect another precision than it holds.
            config = rig.weights._config
            bfloat16 = config.generator.model_copy(update={"dtype": "bfloat16"})
            rig.weights.disconnect()
            rig.weights._config = config.model_copy(update={"generator": bfloat16})
            with pytest.raises(TransferError, match="generator.0 rank 0: .* set generator.dtype"):
                await rig.push(0)
            rig.weights._config = config
            report, _ = await rig.push(0)
            assert report.mismatches == []

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("learner", "generator"),
    [pytest.param((2, 2, 4), (1, 1), id="to-tp1"), pytest.param((1, 1, 1), (2, 1), id="to-tp2")],
)
def test_a_push_takes_two_staging_buffers_of_memory_and_no_more(tmp_path, learner, generator):
    """Of 280 MB of weights. What is measured is the growth of each process's resident set, buffers included: a generator's are
    the learner's, which it maps, and it has a matrix of each stage that is incomplete, and the one that it packs."""
    staging_mib = 64
    largest_mib = 4 * 2 * 2816 * 1024 / 2**20
    shape = ["model.layers=6", "model.hidden_size=1024", "model.ffn_size=2816", "model.heads=16", "model.kv_heads=8"]
    vocabulary = ["model.tokenizer=bytes", "model.vocab_size=null", "warm_start.steps=1"]

    async def run():
        settings = [*shape, *vocabulary, f"weights.staging_mib={staging_mib}", *overrides(learner, generator)]
        async with push_rig(tmp_path, *settings) as rig:
            assert 4 * rig.run_inputs.architecture.num_parameters > 280e6
            before = rig.reset_memory_peaks()
            for _ in range(3):
                report, _ = await rig.push(0)
                assert report.mismatches == []
            growth = {who: (peak - before[who]) / 2**20 for who, peak in rig.memory_peaks().items() if who in before}
            assert len(growth) >= learner[2] + generator[0]
            print({who: round(mib, 1) for who, mib in growth.items()})
            for who, mib in growth.items():
                matrices_mib = 0 if who.startswith("learner") else (learner[1] + 1) * largest_mib
                assert mib <= 2 * staging_mib * 1.1 + matrices_mib, (who, growth)

    asyncio.run(run())
