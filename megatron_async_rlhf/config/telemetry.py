"""What a run writes down while it goes, and whom it tells: the keys of the section `telemetry`."""

from typing import Literal

from pydantic import Field, PositiveFloat

from megatron_async_rlhf.config.section import Section


class WandbKeys(Section):
    """Weights & Biases; `offline` writes into the run directory only."""

    project: str = "megatron-async-rlhf"
    mode: Literal["online", "offline"] = "online"
    entity: str | None = None
    tags: list[str] = []


class TrackioKeys(Section):
    """Trackio; without a Space its dashboard is local."""

    project: str = "megatron-async-rlhf"
    space: str | None = None  # at the hub, as org/name


class PrometheusKeys(Section):
    """Where a Prometheus server can ask for the newest metrics."""

    port: int = Field(9400, ge=0, le=65535)
    host: str = "127.0.0.1"  # the address to listen on; it needs no password, so anyone who reaches it can read it


class TelemetrySection(Section):
    """What is written down while the run goes."""

    wandb: WandbKeys | None = None
    tensorboard: bool = False  # event files in the run directory
    trackio: TrackioKeys | None = None
    prometheus: PrometheusKeys | None = None
    close_timeout_s: PositiveFloat = 120.0  # that W&B, and each of the others, may take at the end of a run
    samples_per_step: int = Field(2, ge=0)  # rollout groups of each step that go to samples.jsonl
