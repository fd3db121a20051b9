"""The checkpoints in a run's directory: their names, which are complete, how one becomes so, which are kept. No torch.

checkpoints/step_000040/          complete: a directory has this name only once everything in it is flushed
checkpoints/step_000040.partial/  being written or deleted, or left over from a process that was killed
checkpoints/reference/            the reference policy, which stays the same: written once, with the first checkpoint
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import is_checkpoint
from megatron_async_rlhf.telemetry.files import CHECKPOINT_DIR, REFERENCE_DIR

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{6,})")
_PARTIAL = ".partial"
_DISCARDED = re.compile(r".+\.[0-9a-f]{8}\.partial")  # no save uses such a name


def has_own_reference(config: RunConfig) -> bool:
    """Whether there is a reference policy that is nowhere else: fresh weights, or a warm start made it."""
    return config.algorithm.has_reference and (config.model.hf is None or config.warm_start.steps > 0)


class RunCheckpoints:
    """The checkpoints of one run: where they are, and which there are."""

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / CHECKPOINT_DIR
        self.reference = run_dir / REFERENCE_DIR

    def path(self, version: int) -> Path:
        """Where the checkpoint of a policy version is, or will be."""
        return self._directory / f"step_{version:06d}"

    def partial(self, complete: Path) -> Path:
        """Where it is until it is complete."""
        return complete.with_name(complete.name + _PARTIAL)

    def versions(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        if not self._directory.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def newest(self, check: Callable[[Path], object]) -> tuple[int | None, dict[Path, CheckpointError]]:
        """The newest version whose checkpoint passes, and what is wrong with those after it; None if none does."""
        broken: dict[Path, CheckpointError] = {}
        for version in reversed(self.versions()):
            try:
                check(self.path(version))
            except CheckpointError as error:
                broken[self.path(version)] = error
            else:
                return version, broken
        return None, broken

    def put_in_place(self, complete: Path) -> None:
        """Flush the partial directory of `complete`, whose every file is there, and give it its name."""
        partial = self.partial(complete)
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        partial.rename(complete)
        _flush(complete.parent)

    def prune(self, keep_last: int | None, best: int | None) -> None:
        """Delete all but the newest `keep_last` and the version `best`, as far as that is possible."""
        for path in self._directory.glob(f"*{_PARTIAL}"):
            if _DISCARDED.fullmatch(path.name):  # could not be deleted then; perhaps now
                shutil.rmtree(path, ignore_errors=True)
        if keep_last is None:
            return
        for version in self.versions()[:-keep_last]:
            if version != best:
                _discard(self.path(version))

    def discard_newer(self, version: int) -> None:
        """Delete those of later versions: the run continues from this one, and saves them again."""
        for later in self.versions():
            if later > version:
                _discard(self.path(later))

    def discard_partial(self, complete: Path) -> None:
        """Give back the room of a save that failed; nobody writes there any more."""
        _discard(self.partial(complete))

    def remove_leftovers(self) -> None:
        """Delete what killed saves and deletions left; only while no process of the run is alive."""
        for path in self._directory.glob(f"*{_PARTIAL}"):
            _discard(path)


def all_checkpoints(path: Path) -> list[Path]:
    """Those of a run, oldest first, and its reference policy; or the checkpoint that `path` is.

    Raises:
        CheckpointError: there is none.
    """
    if is_checkpoint(path):
        return [path]
    checkpoints = RunCheckpoints(path)
    found = [checkpoints.path(version) for version in checkpoints.versions()]
    found += [checkpoints.reference] if checkpoints.reference.is_dir() else []
    if not found:
        what = "has no checkpoints" if path.is_dir() else "there is no such directory"
        raise CheckpointError(f"{path}: {what}; give a checkpoint, or a run with checkpoint.every_steps")
    return found


def _discard(path: Path) -> None:
    """Delete a directory, if it is there. What cannot be deleted is no reason to fail what takes its place.

    NFS keeps a file that somebody still reads under another name, so its directory cannot be removed just then. What is
    left has a name that no save uses: the next `prune` or `remove_leftovers` tries again.
    """
    if not path.exists():
        return
    aside = path.with_name(f"{path.name.removesuffix(_PARTIAL)}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        path.rename(aside)  # half of a checkpoint must not look like one
        shutil.rmtree(aside)
    except OSError as error:
        left = aside if aside.exists() else path
        _log.warning("%s cannot be deleted (%s); it is tried again later", left, error.strerror or error)


def best_version(scores: Mapping[int, float], which: str) -> int | None:
    """The version with the `highest` or `lowest` score; of equals the latest."""
    sign = 1 if which == "highest" else -1
    return max(scores, key=lambda version: (sign * scores[version], version), default=None)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
