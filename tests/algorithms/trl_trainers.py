"""TRL's own trainers on given log-probabilities: only generating and running the model are left out.

Lines are padded on the right, [B, L]. Use inside `float64_default` so that TRL's own tensors have our precision.
"""

from collections import defaultdict, deque
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@contextmanager
def float64_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _set_common(trainer: Any, logprobs: dict[str, torch.Tensor], beta: float) -> None:
    trainer.logprobs = logprobs
    trainer.beta = beta
    trainer.aux_loss_enabled = False
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False, name="policy")
    trainer.ref_model = SimpleNamespace(name="reference")
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._logs = {"prompt": deque(), "completion": deque(), "rewards": defaultdict(deque), "advantages": deque()}
    trainer._logs["extra"] = defaultdict(deque)
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer.accelerator = SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cpu"), is_main_process=True,
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    # what `_generate_and_score_completions` reads beside log-probabilities and rewards
    trainer.environment_factories, trainer.environments, trainer.tools = None, None, []
    trainer._tokenizer = SimpleNamespace(pad_token_id=0)
    trainer.pad_to_multiple_of = None
    trainer.mask_truncated_completions = False
    trainer.reward_func_names, trainer.reward_funcs = ["given"], ["given"]
    trainer.reward_weights = torch.ones(1)


def _args(**keys: Any) -> SimpleNamespace:
    return SimpleNamespace(
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=64,
        gradient_checkpointing_kwargs=None, **keys,
    )  # fmt: skip


def grpo_trainer(
    logprobs: dict[str, torch.Tensor],
    *,
    loss_type: str = "grpo",
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    bias_correction: bool = False,
    max_length: int = 16,
    sampler_correction: bool = False,
):
    """`logprobs`: of `policy` and, where used, `reference`, [B, L]."""
    module = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)

    class GivenGRPO(module.GRPOTrainer):
        def __init__(self):  # the parent's wants a model, a tokenizer and a dataset
            _set_common(self, logprobs, beta)
            self.args = _args(delta=delta, use_bias_correction_kl=bias_correction)
            self.loss_type, self.importance_sampling_level = loss_type, level
            self.epsilon_low, self.epsilon_high = clip_low, clip_high
            self.max_completion_length = max_length
            self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
            self.use_vllm = self.vllm_importance_sampling_correction = sampler_correction
            self._entropy_bonus_enabled = False
            self.num_iterations = 1
            self.multi_objective_aggregation = "sum_then_normalize"
            self.log_multimodal = False

        def _get_per_token_logps_and_entropies(self, model, ids, *_, **__):
            values = self.logprobs[model.name]
            return values, torch.zeros_like(values), None

        def _generate(self, prompts):
            lengths = self.logprobs["mask"].sum(1).tolist()
            ids = [[1] * int(n) for n in lengths]
            sampled = self.logprobs.get("sampler")
            if sampled is not None:
                sampled = [row[: int(n)].tolist() for row, n in zip(sampled, lengths, strict=True)]
            return [[1]] * len(prompts), ids, None, [""] * len(prompts), sampled, {}, None, []

        def _calculate_rewards(self, *_):
            return self.logprobs["rewards"].reshape(-1, 1)

    return GivenGRPO()


def rloo_trainer(
    logprobs: dict[str, torch.Tensor], *, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0
):
    """`logprobs`: of `policy` and, where used, `reference`, [B, L]."""
    module = pytest.importorskip("trl.trainer.rloo_trainer", exc_type=ImportError)

    class GivenRLOO(module.RLOOTrainer):
        def __init__(self):
            _set_common(self, logprobs, beta)
            self.args = _args()
            self.epsilon_low, self.epsilon_high = clip_low, clip_high
            self.reward_clip_range, self.normalize_advantages = None, False

        def _get_per_token_logps_and_entropies(self, model, ids, *_, **__):
            values = self.logprobs[model.name]
            return values, torch.zeros_like(values), None

        def _generate(self, prompts):
            ids = [[1] * int(n) for n in self.logprobs["mask"].sum(1).tolist()]
            return [[1]] * len(prompts), ids, [""] * len(prompts)

        def _calculate_rewards(self, *_):
            return self.logprobs["rewards"].reshape(-1, 1)

    return GivenRLOO()


def loss_inputs(mask_BL: torch.Tensor, advantages: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `_compute_loss` reads; token ids do not matter to given log-probabilities."""
    ones_BL = torch.ones_like(mask_BL, dtype=torch.long)
    return {
        "prompt_ids": ones_BL[:, :1],
        "prompt_mask": ones_BL[:, :1],
        "completion_ids": ones_BL,
        "completion_mask": mask_BL.long(),
        "advantages": advantages,
        "num_items_in_batch": mask_BL.sum(),
        **others,
    }


def scored(trainer: Any, samples: int) -> dict[str, torch.Tensor]:
    """What TRL makes of rewards and log-probabilities before the loss."""
    trainer.num_generations = samples
    return trainer._generate_and_score_completions([{"prompt": "p"}] * len(trainer.logprobs["rewards"]))
