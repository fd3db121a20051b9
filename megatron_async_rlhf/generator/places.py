"""What a run needs of the limits of this machine: open files and threads.

How many requests may be under way to one generator: each is an open file here, and one at its server.

Those that have no place wait for one, in order. Which sequences share a forward pass does not depend on that as long as
the engine always finds the next one in its queue: then it never runs dry before the last request has come. So there must be
twice as many places as an engine has sequences in work.
"""

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.limits import open_files, threads_left

_OTHER_FILES = 160  # of a controller or server besides its requests: libraries, logs, sockets of engine and workers
_REWARD_FILES = 64  # requests to one server of a reward model at once (`rewards.reward_server.PLACES`)
_THREADS = 64  # of a learner rank, and of a server's worker: those of torch and gloo, most of them idle


def places(config: RunConfig) -> int:
    """Requests to one generator at once, with the limit of this process."""
    return max((open_files() - _other_files(config)) // config.generator.replicas, 1)


def places_problem(config: RunConfig) -> str | None:
    """Why this process may open too few files for a run; None if it may open enough."""
    most = max(config.data.eval_prompts, config.schedule.groups_per_rollout)
    needed = min(most, 2 * config.generator.max_concurrent)
    if places(config) >= needed:
        return None
    files = needed * config.generator.replicas + _other_files(config)
    return (
        f"open files: the limit is {open_files()}, and generator.replicas = {config.generator.replicas} with {needed} "
        f"requests each need {files}; raise it (ulimit -n {files}, or LimitNOFILE, --ulimit nofile={files}), or lower "
        "generator.max_concurrent"
    )


def threads_problem(config: RunConfig) -> str | None:
    """Why the processes of a run on this machine may start too few threads; None if they may start enough."""
    left, generator = threads_left(), config.generator
    processes = config.learner.world_size + generator.replicas * (1 + generator.tensor_parallel)
    processes += config.reward_workers + sum(s.replicas for s in config.served_reward_models.values())
    needed = _THREADS * (1 + -(-processes // config.launch.nodes))
    if left is None or left >= needed:
        return None
    return (
        f"processes and threads: {left} more may be started, and a run needs about {needed} here; raise the limit "
        "(ulimit -u, TasksMax, --pids-limit)"
    )


def _other_files(config: RunConfig) -> int:
    servers = sum(len(section.url or range(section.replicas)) for section in config.reward_models.values())
    return _OTHER_FILES + servers * _REWARD_FILES
