"""Generator memory and step times against figures computed another way."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.fitting import generator_budget, run_memory
from megatron_async_rlhf.estimate.generator_memory import (
    GIB,
    PREFILL_TOKENS,
    cache_bytes_per_token,
    generator_memory,
)
from megatron_async_rlhf.estimate.holdings import generator_holding
from megatron_async_rlhf.estimate.learner_speed import learner_step, trained_token_flops
from megatron_async_rlhf.estimate.machines import CPU_CORE, machine_of
from megatron_async_rlhf.estimate.speed import estimate_speed
from megatron_async_rlhf.generator.vllm.server import server_command
from megatron_async_rlhf.jobs.inputs import resolve_architecture
from megatron_async_rlhf.launch.layout import lay_out
from megatron_async_rlhf.launch.nodes import Node
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import output_flops, token_flops

EXAMPLE = "examples/llama8b_async.yaml"


@pytest.fixture
def llama8b(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Config with overrides, and the architecture."""
    monkeypatch.chdir(request.config.rootpath)

    def load(*overrides: str) -> tuple[RunConfig, Architecture]:
        config = load_config(request.config.rootpath / EXAMPLE, overrides)
        return config, resolve_architecture(config, config.model.hf)[0]

    return load


@pytest.mark.parametrize("tied", [False, True])
def test_token_flops_are_those_torch_counts(tied: bool):
    tokens = 40
    shape = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    arch = Architecture(
        vocab_size=96, layers=3, hidden_size=64, ffn_size=112, heads=4, kv_heads=2, head_dim=16, context_length=64,
        rope_theta=1e4, norm_eps=1e-5, tie_embeddings=tied,
    )  # fmt: skip
    # Torch multiplies masked scores too, so every token sees all.
    assert tokens * token_flops(arch, tokens) == counter.get_total_flops()


def test_weights_and_cache_of_llama_8b(llama8b):
    config, arch = llama8b()
    assert generator_holding(arch, 1).total == arch.num_parameters == 8_030_261_248
    assert cache_bytes_per_token(config, arch) == 128 * 1024  # as published for its 32 layers of 8 heads of 128
    memory = generator_memory(config, arch, fixed=0)
    share = round(config.generator.gpu_memory_share * 80 * GIB)
    assert memory.weights + memory.cache + memory.activations == share
    assert memory.cache_tokens * 128 * 1024 == pytest.approx(memory.cache, abs=128 * 1024)


ON_ONE_GPU = (
    "weights.transport=ipc", "learner.ranks=1", "learner.tensor_parallel=1", "learner.sequence_parallel=false",
    "generator.replicas=1", "learner.micro_batch_tokens=3072",
)  # fmt: skip


@pytest.mark.parametrize("gib", [230, 240, 2000])
def test_a_generator_on_the_learners_gpu_gets_what_that_leaves(llama8b, gib: int):
    """With the default share, and with room for what the learner's estimate may be wrong by."""
    config, arch = llama8b(*ON_ONE_GPU, f"launch.gpu_memory_gib={gib}")
    memory = run_memory(config, arch)
    worker, learner = memory.generator, memory.largest_rank
    assert worker.cache >= worker.smallest_cache
    assert worker.total + 1.15 * learner <= gib * GIB + 1
    most = config.generator.max_concurrent * worker.smallest_cache
    assert worker.cache == most if gib == 2000 else worker.cache < most  # generation cannot use more than that
    budget = generator_budget(config, arch)
    assert budget.cache == worker.cache
    assert budget.share * gib * GIB == pytest.approx(
        worker.weights + worker.activations + worker.cache, abs=gib * GIB / 1000
    )


def test_a_share_bounds_a_generator_on_the_learners_gpu_too(llama8b):
    config, arch = llama8b(*ON_ONE_GPU, "launch.gpu_memory_gib=300", "generator.gpu_memory_share=0.07")
    budget = generator_budget(config, arch)
    worker = run_memory(config, arch).generator
    assert budget.share == 0.07
    assert worker.weights + worker.activations + budget.cache == round(0.07 * 300 * GIB)


def test_two_workers_share_weights_and_cache(llama8b):
    (one, arch), (two, _) = llama8b(), llama8b("generator.tensor_parallel=2", "generator.replicas=2")
    assert cache_bytes_per_token(two, arch) == cache_bytes_per_token(one, arch) // 2
    norms = (2 * arch.layers + 1) * arch.hidden_size
    assert 2 * generator_holding(arch, 2).total == arch.num_parameters + norms


def test_a_cpu_worker_has_the_cache_it_is_given(llama8b):
    on_cpu = ("run.device=cpu", "weights.transport=gloo", "generator.kv_cache_gib=3")
    config, arch = llama8b(*on_cpu)
    assert generator_memory(config, arch, fixed=0).cache == 3 * GIB
    config, arch = llama8b(
        *on_cpu, "generator.max_concurrent=2", "model.context_length=1000", "generator.max_new_tokens=500"
    )
    blocks = 2 * (8 + 1)  # of 128 tokens, for two sequences, each with one that vLLM keeps to itself
    assert generator_memory(config, arch, fixed=0).cache == blocks * 128 * cache_bytes_per_token(config, arch)


def test_prefill_is_the_servers(llama8b, tmp_path):
    config, _ = llama8b()
    command = server_command(config, tmp_path, ("127.0.0.1", 8000), context_length=64)
    assert int(command[command.index("--max-num-batched-tokens") + 1]) == PREFILL_TOKENS


def test_speeds_follow_from_the_data_sheet(llama8b):
    config, arch = llama8b()
    memory = generator_memory(config, arch, fixed=0)
    speed = estimate_speed(config, arch, memory)
    assert (speed.prompt, speed.completion) == (256, 512), "half of what they may be"
    # 6 + 2 FLOPs per parameter that multiplies and 45 % of four H100s; 4 % more for attention and for the logits' second
    # time.
    matrices = arch.num_parameters - arch.vocab_size * arch.hidden_size
    step = speed.learner
    assert step.tokens == 256 * 768, "two of each prompt's completions"
    assert step.compute == pytest.approx(step.tokens * 1.035 * 8 * matrices / (0.45 * 4 * 989e12), rel=0.01)
    # In each of 32 layers two sums of a forward, a backward and the reference's pass: 3/4 of 4096 numbers twice, 2 bytes each.
    assert step.tensor == pytest.approx(step.tokens * 32 * 6 * 1.5 * 4096 * 2 / (0.7 * 450e9))
    # 34 bytes for each number of the largest rank.
    assert step.optimizer == pytest.approx(34 * arch.num_parameters / 4 / 2.01e12, rel=0.01)
    assert step.bubble == step.reduction == 0
    assert speed.trained_per_s == pytest.approx(step.tokens / (step.compute + step.tensor + step.optimizer))
    # 2 ms, and 16 GB of weights at 60 % of 3.35 TB/s; 20 us, a sequence's cache of 512 tokens, and its prompt at 50 % of the peak.
    assert speed.token_s == pytest.approx(0.002 + 2 * arch.num_parameters / 2.01e12, rel=0.01)
    # Of the prompt all but half a block of 16 is shared by two samples.
    prompt_s = (8.5 + 247.5 / 2) * 2 * matrices / (0.5 * 989e12)
    assert speed.sequence_s == pytest.approx(2e-5 + 512 * 128 * 1024 / 2.01e12 + prompt_s / 512, rel=0.02)
    # A staging buffer for each of three further replicas.
    handed_on = 3 * config.weights.staging_bytes
    assert speed.push_s == pytest.approx(0.3 + (2 * arch.num_parameters + handed_on) / 25e9, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "policy_passes", "value_passes"),
    [
        (["algorithm={type: best_of_n}"], 3, 0),
        (["algorithm={type: online_dpo}"], 4, 0),
        (["algorithm={type: rloo}"], 5, 0),  # the KL in the reward is the proximal policy's
        (["algorithm={type: ppo}", "schedule.epochs=2", "schedule.max_staleness=2"], 3 + 2 / 2, 3 + 1 / 2),
        (["algorithm={type: ppo}", "learner.recompute=full"], 4 + 2, 4 + 1),
    ],
)
def test_a_trained_token_takes_the_passes_of_its_algorithm(
    llama8b, overrides: list[str], policy_passes: float, value_passes: float
):
    config, arch = llama8b(*overrides)
    length, head = 1024, 2 * arch.vocab_size * arch.hidden_size
    once = token_flops(arch, length / 2)
    # Logits are computed once more, whether layers are or not; a value model has none.
    again = head if config.learner.recompute != "full" else 0
    expected = policy_passes * once + again + value_passes * (once - head)
    assert trained_token_flops(config, arch, length) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("override", "faster"),
    [
        ("launch.gpu=b200", "both"),
        ("launch.gpu=h200", "generated_per_s"),  # more bandwidth, the same arithmetic
        ("learner.recompute=full", "none"),
        ("generator.replicas=2", "none"),
    ],
)
def test_what_makes_a_step_faster(llama8b, override: str, faster: str):
    speeds = []
    for overrides in ((), (override,)):
        config, arch = llama8b(*overrides)
        speeds.append(estimate_speed(config, arch, generator_memory(config, arch, fixed=0)))
    before, after = speeds
    names = ("trained_per_s", "generated_per_s")
    gained = {name for name in names if getattr(after, name) > 1.01 * getattr(before, name)}
    assert gained == {"both": set(names), "none": set()}.get(faster, {faster})


def test_copies_divide_the_tokens_and_send_their_gradients(llama8b):
    keys = ("launch.nodes=2", "launch.gpus_per_node=8", "learner.distributed_optimizer=true")
    (one, arch), (two, _) = llama8b(), llama8b("learner.ranks=8", *keys)
    (alone, both) = (learner_step(config, arch, machine_of(config), 512.0, 256.0) for config in (one, two))
    assert both.compute == pytest.approx(alone.compute / 2) and both.tensor == pytest.approx(alone.tensor / 2)
    assert both.optimizer == pytest.approx(alone.optimizer / 2)
    # Float32 gradients there, bf16 weights back, half of them each, over NVLink.
    held = generator_holding(arch, 4).total
    assert both.reduction == pytest.approx(6 * held / 2 / (0.7 * 450e9), rel=0.01)
    hidden, _ = llama8b("learner.ranks=8", *keys, "learner.overlap_grad_reduce=true")
    assert learner_step(hidden, arch, machine_of(hidden), 512.0, 256.0).reduction == pytest.approx(0.3 * both.reduction)
    far, _ = llama8b("learner.ranks=16", *keys, "launch.nodes=3")
    assert learner_step(far, arch, machine_of(far), 512.0, 256.0).reduction == pytest.approx(
        6 * held * 3 / 4 / (2 * 0.7 * 50e9),
        rel=0.01,  # by two cards, one of four ranks each
    )


def test_a_value_model_is_updated_too(llama8b):
    """It has all of the policy's weights but the output matrix: 525 million of 8.03 billion."""
    (without, arch), (ppo, _) = (
        llama8b(f"algorithm={{type: {kind}}}", "learner.ranks=8", "launch.nodes=2") for kind in ("grpo", "ppo")
    )
    alone, both = (learner_step(config, arch, machine_of(config), 512.0, 256.0) for config in (without, ppo))
    assert both.optimizer == pytest.approx(alone.optimizer * (2 - 0.525 / 8.03), rel=0.01)
    assert both.reduction == pytest.approx(alone.reduction * (2 - 0.525 / 8.03), rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "forward", "backward"),
    [
        (["algorithm={type: online_dpo}"], 2, 1),
        (["algorithm={type: ppo}", "schedule.epochs=2", "schedule.max_staleness=2"], 2 + 2 / 2 + 1 / 2, 2),
        (["algorithm={type: ppo}", "learner.recompute=full"], 4 + 3, 2),
    ],
)
def test_every_pass_sums_over_tensor_parallel_ranks(llama8b, overrides: list[str], forward: float, backward: float):
    config, arch = llama8b(*overrides)
    sums = 2 * 32 * (forward + backward)
    tokens = config.algorithm.trained_samples * config.schedule.prompts_per_step * 768
    step = learner_step(config, arch, machine_of(config), 512.0, 256.0)
    assert step.tensor == pytest.approx(tokens * sums * 1.5 * 4096 * 2 / (0.7 * 450e9))


@pytest.mark.parametrize(
    ("on_machine", "way", "length", "hidden"),
    [
        (8, 0.7 * 450e9, 256.0, False),
        (9, 0.7 * 450e9, 256.0, False),
        (4, 0.7 * 50e9, 4096.0, False),
        (8, 0.7 * 450e9, 4096.0, True),
    ],
)
def test_context_parallel_ranks_send_keys_and_values_while_they_attend(
    llama8b, on_machine: int, way: float, length: float, hidden: bool
):
    """Of 8 heads with 128 numbers each, 2 of them on each of four tensor-parallel ranks, from the other rank of two."""
    keys = (f"launch.gpus_per_node={on_machine}", "launch.nodes=3")
    (alone, arch), (divided, _) = (
        llama8b("learner.ranks=4", *keys),
        llama8b("learner.ranks=8", "learner.context_parallel=2", *keys),
    )
    one, two = (learner_step(config, arch, machine_of(config), length / 2, length / 2) for config in (alone, divided))
    assert one.context == 0 and two.compute == pytest.approx(one.compute / 2)
    moved = 32 * 2 * 2 * 128 * 2 / way
    attention = 32 * 4 * 4096 * length / 2 / (0.45 * 4 * 989e12)  # scores and values, over half the sequence
    # A forward pass of the policy and one of the reference, and a backward pass, in which twice as much goes both ways.
    assert two.context == pytest.approx(two.tokens / 2 * 4 * max(0.0, moved - attention))
    assert (two.context == 0) == hidden
    assert two.total == pytest.approx(two.fixed + two.compute + two.tensor + two.context)


def test_a_pipeline_waits_at_its_ends(llama8b):
    config, arch = llama8b(
        "learner.tensor_parallel=1", "learner.pipeline_parallel=4", "learner.sequence_parallel=false"
    )
    step = learner_step(config, arch, machine_of(config), 512.0, 256.0)
    passes = step.tokens / config.learner.micro_batch_tokens
    # The last stage has the logits besides, which the others wait for, but have nothing of themselves.
    layers = 4 * (token_flops(arch, 768 / 2) - output_flops(arch)) / 4
    share = layers / (layers + 5 * output_flops(arch))
    assert step.bubble == pytest.approx(3 / passes * step.compute * share) and step.tensor == 0


@pytest.mark.parametrize(
    ("overrides", "of_rank", "of_worker"),
    [
        ([], 1, 1),
        (["learner.threads=2"], 1, 1),  # the generator keeps its core
        (["learner.ranks=2"], 0.5, 1),
        (["learner.threads=4", "launch.gpus_per_node=8"], 4, 1),
        (["generator.replicas=4", "launch.gpus_per_node=4"], 1, 0.75),
        (["launch.cores=shared", "schedule.mode=sync"], 2, 2),
    ],
)
def test_ranks_and_workers_compute_with_the_cores_that_they_are_given(request, overrides, of_rank, of_worker):
    example = request.config.rootpath / "examples/quickstart.yaml"
    config = load_config(example, ["launch.gpus_per_node=2", *overrides])
    machine = machine_of(config)
    assert (machine.learner, machine.prefill) == (CPU_CORE.learner * of_rank, CPU_CORE.prefill * of_worker)
    cores = list(range(config.launch.gpus_per_node))
    nodes = [Node(name="here", cores=cores, gpus=[], ports=[], generator_ports=[])]
    layout = lay_out(config, nodes, config.generator.replicas)
    for slots, each in ((layout.learners, of_rank), ([slots[0] for slots in layout.generators], of_worker)):
        assert len({core for slot in slots for core in slot.devices}) == each * len(slots)
