"""The `launch.slurm` section: how `async-rlhf launch --executor slurm` asks a Slurm cluster for machines; a run ignores it."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from megatron_async_rlhf.config.section import Section

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _check_time(value: str) -> str:
    if not _TIME.fullmatch(value):
        raise ValueError(f"{value!r} is no time: write hours:minutes:seconds or days-hours:minutes:seconds")
    return value


def _check_names(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
    return value


Variables = Annotated[dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]], AfterValidator(_check_names)]


class SlurmKeys(Section):
    """Every job gets whole machines: `launch.nodes` of them, with `launch.gpus_per_node` GPUs each if the run is on GPUs."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: Annotated[str, AfterValidator(_check_time)] = "01:00:00"  # of each stage
    exclusive: bool = True  # share the machines with nobody; else give cpus_per_node
    cpus_per_node: PositiveInt | None = None  # default: all, if exclusive; else what Slurm gives, which may be one
    memory: str | None = "0"  # of each machine, as --mem takes it; 0 is all of it
    request_gpus: bool = (
        True  # by --gpus-per-node; false where Slurm does not know of GPUs, or for another way in `sbatch`
    )
    sbatch: dict[str, str | int | bool] = {}  # any other flag of sbatch: {signal: TERM@300, gres: "gpu:8"}
    srun: list[str] = []  # further arguments of srun
    retries: int = Field(0, ge=0)  # how often a job that failed, or saved before its time was up, is queued again
    tunnel: Literal["local", "ssh"] = "local"  # where sbatch is called: here, which is a login node, or over ssh
    host: str | None = None  # the login node
    user: str | None = None
    port: PositiveInt | None = None
    identity: Path | None = None  # private key; else ssh's agent, or it asks for the password
    # Where scripts and logs go, which all machines must see. Default: NEMORUN_HOME, else ~/.nemo_run; with ssh on the cluster
    job_dir: Path | None = None
    project_dir: Path | None = None  # where stages run and relative paths begin; default: the current directory
    python: str | None = None  # with the project installed; default: the project's .venv, in a container python3
    setup: list[str] = []  # shell lines before the command: [module load cuda]
    environment: Variables = {}
    container: str | None = None  # an image, for Pyxis; else stages run on the machine itself
    container_mounts: list[str] = []  # host:container[:options]; project_dir is mounted in any case

    @property
    def time_s(self) -> int:
        """As Slurm reads it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
        days, separator, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if separator:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    @model_validator(mode="after")
    def check_tunnel(self) -> "SlurmKeys":
        if self.tunnel == "ssh":
            for key in ("host", "user", "job_dir", "project_dir"):
                if getattr(self, key) is None:
                    raise ValueError(f"tunnel = ssh needs launch.slurm.{key}")
        elif self.host is not None:
            raise ValueError(f"host = {self.host} needs tunnel = ssh")
        return self
