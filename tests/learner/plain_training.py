"""Training without Megatron and without our losses: Transformers' models, torch's AdamW, one sequence at a time.

What the learner's steps are compared with. Written from the papers' formulas; slow on purpose.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel


def completion_logprobs(model: PreTrainedModel, row: tuple[list[int], int], temperature: float) -> torch.Tensor:
    token_ids, prompt_length = torch.tensor(row[0]), row[1]
    logits_TV = model(token_ids.unsqueeze(0)).logits[0] / temperature
    logprobs_T = logits_TV.log_softmax(-1)[:-1].gather(-1, token_ids[1:, None]).squeeze(-1)
    return logprobs_T[prompt_length - 1 :]


def adamw(model: torch.nn.Module, keys: dict) -> torch.optim.AdamW:
    """Weight decay spares one-dimensional parameters, as in Megatron."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": keys["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(keys["adam_beta1"], keys["adam_beta2"]), eps=keys["adam_eps"])


def step(model: torch.nn.Module, optimizer: torch.optim.AdamW, loss: torch.Tensor, keys: dict, progress: float) -> dict:
    learning_rate = keys["min_learning_rate"] + (keys["learning_rate"] - keys["min_learning_rate"]) * (1 - progress)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), keys["clip_grad"])
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate}


@dataclass
class Sample:
    """One sequence of a mini-batch, and what was found out about it before the first update."""

    row: tuple[list[int], int]
    reward: float
    group: int
    sampler: torch.Tensor
    reference: torch.Tensor | None = None
    proximal: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    advantages: torch.Tensor | None = None  # of each token, or one of all


@dataclass
class PlainLearner:
    """Policy, reference and value model, trained as `algorithm` says.

    Args:
        algorithm: keys of the config's section, all of them.
        keys: of the learner's section.
    """

    policy_hf: str
    algorithm: dict
    keys: dict
    temperature: float
    total_steps: int
    longest: int
    steps_made: int = 0
    history: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(self.policy_hf, dtype=torch.float32)
        self.reference = AutoModelForCausalLM.from_pretrained(self.policy_hf, dtype=torch.float32)
        self.optimizer = adamw(self.policy, self.keys)
        if self.algorithm["type"] == "ppo":
            source = self.algorithm["value_hf"] or self.policy_hf
            self.value = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
            if not self.algorithm["value_hf"]:
                torch.nn.init.zeros_(self.value.score.weight)
            rate = self.algorithm["value_learning_rate"] or self.keys["learning_rate"]
            lowest = self.keys["min_learning_rate"] * rate / self.keys["learning_rate"]
            self.value_keys = self.keys | {"learning_rate": rate, "min_learning_rate": lowest}
            self.value_optimizer = adamw(self.value, self.value_keys)

    def train_rollout(self, mini_batches: list[list[dict]], epochs: int) -> None:
        batches = [self.samples_of(groups) for groups in mini_batches]
        with torch.no_grad():
            for batch in filter(None, batches):
                self.prepare(batch)
        for _ in range(epochs):
            for batch in batches:
                self.history.append(self.update(batch) if batch else {"num_sequences": 0.0})
                self.steps_made += 1  # the rate follows the version

    def samples_of(self, groups: list[dict]) -> list[Sample]:
        return [
            Sample(row=tuple(row), reward=reward, group=number, sampler=torch.tensor(sampler))
            for number, group in enumerate(groups)
            for row, reward, sampler in zip(group["sequences"], group["rewards"], group["sampler"], strict=True)
        ]

    def logprobs(self, model: PreTrainedModel, row: tuple[list[int], int]) -> torch.Tensor:
        return completion_logprobs(model, row, self.temperature)

    def values_of(self, row: tuple[list[int], int]) -> torch.Tensor:
        """Of the state before each completion token."""
        token_ids, prompt_length = row
        hidden = self.value.model(torch.tensor([token_ids])).last_hidden_state[0]
        return self.value.score(hidden).squeeze(-1)[prompt_length - 1 : -1]

    def prepare(self, batch: list[Sample]) -> None:
        kl = self.algorithm.get("kl")
        for sample in batch:
            sample.reference = self.logprobs(self.reference, sample.row)
            sample.proximal = self.logprobs(self.policy, sample.row)
        if kl is None:
            return
        penalties = [torch.zeros_like(sample.proximal) for sample in batch]
        if kl["place"] == "reward":
            estimate = ESTIMATORS[kl["estimator"]]
            penalties = [-kl["coefficient"] * estimate(sample.proximal - sample.reference) for sample in batch]
        if self.algorithm["type"] == "ppo":
            self.prepare_values(batch, penalties)
            return
        rewards = [sample.reward + penalty.sum().item() for sample, penalty in zip(batch, penalties, strict=True)]
        for i, sample in enumerate(batch):
            group = [rewards[j] for j, other in enumerate(batch) if other.group == sample.group]
            mean = sum(group) / len(group)
            if self.algorithm["type"] == "grpo":
                spread = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1)) + 1e-4
                advantage = (rewards[i] - mean) / (spread if self.algorithm["scale_advantages"] else 1)
            else:
                advantage = rewards[i] - (sum(group) - rewards[i]) / (len(group) - 1)
            sample.advantages = torch.tensor(advantage)

    def prepare_values(self, batch: list[Sample], penalties: list[torch.Tensor]) -> None:
        gamma, lam = self.algorithm["gamma"], self.algorithm["gae_lambda"]
        for sample, rewards in zip(batch, penalties, strict=True):
            sample.values = self.values_of(sample.row)
            advantages, later, next_value = [], 0.0, 0.0
            for t in reversed(range(len(rewards))):
                reward = rewards[t] + (sample.reward if t == len(rewards) - 1 else 0.0)
                later = reward + gamma * next_value - sample.values[t] + gamma * lam * later
                next_value = sample.values[t]
                advantages.insert(0, later)
            sample.advantages = torch.tensor(advantages)
            sample.returns = sample.advantages + sample.values
        if self.algorithm["whiten_advantages"]:
            everything = torch.cat([sample.advantages for sample in batch])
            for sample in batch:
                sample.advantages = (sample.advantages - everything.mean()) / (everything.var() + 1e-8).sqrt()

    def update(self, batch: list[Sample]) -> dict:
        progress = self.steps_made / self.total_steps
        rows = [self.logprobs(self.policy, sample.row) for sample in batch]
        loss, parts = self.policy_loss(batch, rows)
        metrics = step(self.policy, self.optimizer, loss, self.keys, progress) | parts
        metrics["num_sequences"] = float(len(batch))
        metrics["kl_to_reference"] = sum(
            (row.detach() - sample.reference).sum().item() for row, sample in zip(rows, batch, strict=True)
        ) / len(batch)
        if self.algorithm["type"] == "ppo":
            value_loss = self.value_loss(batch)
            scaled = self.algorithm["value_coefficient"] * value_loss
            of_value = step(self.value, self.value_optimizer, scaled, self.value_keys, progress)
            metrics["loss"] += of_value["loss"]
            metrics["value_loss"] = value_loss.item()
            metrics["value/grad_norm"] = of_value["grad_norm"]
            metrics["value/learning_rate"] = of_value["learning_rate"]
        return metrics

    def policy_loss(self, batch: list[Sample], rows: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        kind = self.algorithm["type"]
        if kind == "online_dpo":
            gaps = [row.sum() - sample.reference.sum() for row, sample in zip(rows, batch, strict=True)]
            h_P = torch.stack(gaps[0::2]) - torch.stack(gaps[1::2])
            return -torch.nn.functional.logsigmoid(self.algorithm["beta"] * h_P).mean(), {}
        if kind == "best_of_n":
            return -sum(row.sum() for row in rows) / len(batch), {}
        weights = self.weights(batch)
        if kind in ("rloo", "proximal_rloo"):
            loss = self.loss_of_completions(batch, rows, weights) / len(batch)
        else:
            loss = self.loss_of_tokens(batch, rows, weights)
        parts = {"policy_loss": loss.item()}
        kl = self.algorithm["kl"]
        if kl["place"] == "loss" and kl["coefficient"]:
            term = self.kl_loss(batch, rows, weights)
            parts["kl_loss"] = term.item()
            loss = loss + kl["coefficient"] * term
        if self.algorithm["correction"]["type"] != "none":
            flat = torch.cat([w.reshape(-1) for w in weights])
            parts["correction/weight"] = flat.mean().item()
            parts["correction/effective_sample_share"] = (flat.sum() ** 2 / (len(flat) * (flat**2).sum())).item()
        return loss, parts

    def weights(self, batch: list[Sample]) -> list[torch.Tensor]:
        """Of each token, or one for all tokens of a sequence."""
        keys = self.algorithm["correction"]
        whole = self.algorithm["type"] in ("rloo", "proximal_rloo") or keys["type"] == "mask_sequences"
        weights = []
        for sample in batch:
            log_ratio = sample.proximal - sample.sampler
            rho = (log_ratio.sum() if whole else log_ratio).exp()
            if keys["type"] == "none":
                weights.append(torch.ones_like(rho))
            elif keys["type"] in ("truncate", "decoupled"):
                weights.append(rho.clamp(max=keys["high"] or (2.0 if keys["type"] == "truncate" else math.inf)))
            else:
                low = keys["low"] if keys["low"] is not None else {"mask": 0.5, "mask_sequences": 0.0}[keys["type"]]
                high = keys["high"] or {"mask": 5.0, "mask_sequences": 2.0}[keys["type"]]
                weights.append(torch.where((rho >= low) & (rho <= high), rho, 0.0))
        return weights

    def base(self, sample: Sample) -> torch.Tensor:
        return sample.sampler if self.algorithm["ratio_base"] == "sampler" else sample.proximal

    def clipped(self, ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        near = ratio.clamp(1 - self.algorithm["clip_low"], 1 + self.algorithm["clip_high"])
        if cap := self.algorithm.get("dual_clip"):
            ratio = ratio.clamp(max=cap)
        return -torch.minimum(ratio * advantage, near * advantage)

    def loss_of_completions(self, batch: list[Sample], rows: list[torch.Tensor], weights: list) -> torch.Tensor:
        losses = []
        for sample, row, weight in zip(batch, rows, weights, strict=True):
            if self.algorithm["type"] == "rloo":
                losses.append(-weight * sample.advantages * row.sum())
            else:
                ratio = (row.sum() - self.base(sample).sum()).exp()
                losses.append(weight * self.clipped(ratio, sample.advantages))
        return sum(losses)

    def loss_of_tokens(self, batch: list[Sample], rows: list[torch.Tensor], weights: list) -> torch.Tensor:
        losses = []
        for sample, row, weight in zip(batch, rows, weights, strict=True):
            log_ratio = row - self.base(sample)
            if self.algorithm.get("ratio") == "sequence":
                log_ratio = log_ratio.sum().expand(len(row)) / max(1, len(row))
            if self.algorithm.get("loss") == "cispo":
                ratio = log_ratio.detach().exp().clamp(max=self.algorithm["cispo_high"])
                losses.append(-weight * ratio * sample.advantages * row)
            else:
                losses.append(weight * self.clipped(log_ratio.exp(), sample.advantages))
        return self.mean(losses)

    def mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Over tokens, as the algorithm counts them."""
        kind = self.algorithm.get("normalisation", "token")
        if self.algorithm["type"] in ("rloo", "proximal_rloo"):
            return sum(loss.sum() for loss in losses) / len(losses)
        if kind == "token":
            return sum(loss.sum() for loss in losses) / sum(len(loss) for loss in losses)
        if kind == "sequence":
            return sum(loss.mean() for loss in losses if len(loss)) / len(losses)
        return sum(loss.sum() for loss in losses) / (self.longest * len(losses))

    def kl_loss(self, batch: list[Sample], rows: list[torch.Tensor], weights: list) -> torch.Tensor:
        kl, terms = self.algorithm["kl"], []
        for sample, row, weight in zip(batch, rows, weights, strict=True):
            gap = row - sample.reference
            term = ESTIMATORS[kl["estimator"]](gap)
            if kl["gradient"] == "policy":
                own = gap.detach() * row  # its gradient: (log pi - log pi_ref) grad log pi
                term = term.detach() + own - own.detach()
            terms.append(weight * term)
        return self.mean(terms)

    def value_loss(self, batch: list[Sample]) -> torch.Tensor:
        losses, clip = [], self.algorithm["value_clip"]
        for sample in batch:
            values = self.values_of(sample.row)
            worst = (values - sample.returns) ** 2
            if clip is not None:
                near = sample.values + (values - sample.values).clamp(-clip, clip)
                worst = torch.maximum(worst, (near - sample.returns) ** 2)
            losses.append(worst)
        return 0.5 * torch.cat(losses).mean()


ESTIMATORS = {
    "k1": lambda gap: gap,
    "k2": lambda gap: gap**2 / 2,
    "k3": lambda gap: (-gap).exp() - 1 + gap,
}
