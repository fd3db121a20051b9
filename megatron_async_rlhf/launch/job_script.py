"""The shell script that runs a stage, the same on a laptop and on every machine of a Slurm job."""

import shlex
from collections.abc import Mapping, Sequence

from megatron_async_rlhf.launch.stages import Stage

_END = "END_OF_CONFIG"


def job_script(
    stage: Stage,
    *,
    python: str,
    directory: str,
    environment: Mapping[str, str] = {},
    setup: Sequence[str] = (),
    pid_file: bool = False,
) -> str:
    """For bash, without a first line. The command takes the shell's place: its signals and its exit code are the command's.

    Args:
        python: of the environment that trains.
        directory: where relative paths begin.
        setup: lines of shell.
        pid_file: leave the process id in `<script>.pid`.
    """
    lines = [f"cd -- {shlex.quote(directory)} || exit 1"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += setup
    if pid_file:
        lines.append('echo $$ >"$0.pid"')
    command = f"exec {shlex.join([python, '-m', 'megatron_async_rlhf', *stage.arguments])}"
    if stage.resumes:
        command += " ${SLURM_RESTART_COUNT:+--resume}"  # set if the job was requeued
    if stage.config:
        lines += [f"{command} <<'{_END}'", stage.config.rstrip("\n"), _END]
    else:
        lines.append(command)
    return "\n".join(lines) + "\n"
