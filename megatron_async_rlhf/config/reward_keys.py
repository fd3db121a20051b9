"""What the sections of rewards have in common."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_async_rlhf.config.written_key import Key, ReportingSection


class RewardKeys(ReportingSection):
    """What all types of rewards have; metrics are of each completion.

    Attributes:
        columns: fields of a record that the reward reads without `data.reference_fields` naming them.
        may_change: keys that a resumed run may change, as they do not change what a completion earns.
        packages: modules that it imports and that only the extra `rewards` installs.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    may_change: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        type: str  # each class below has its own as a field

    name: str | None = Field(None, pattern=r"^[A-Za-z_][\w.-]*$")  # of its metrics in a list; default: its type
    weight: float = 1.0  # of its scores, in the sum that is trained on

    @property
    def reads_solution(self) -> bool:
        """Whether it needs the solution of every prompt."""
        return False

    @property
    def title(self) -> str:
        return self.name or self.type

    @model_validator(mode="before")
    @classmethod
    def drop_key_of_another_type(cls, tree: Any) -> Any:
        """The resolved configurations of version 0.1.0 have `format_reward` whatever the type is."""
        if isinstance(tree, dict) and "format_reward" not in cls.model_fields and tree.get("format_reward") == 0.1:
            return {key: value for key, value in tree.items() if key != "format_reward"}
        return tree


class FallibleKeys(RewardKeys):
    """Of a reward that may fail on a completion that is nobody's fault."""

    may_change: ClassVar[tuple[str, ...]] = ("on_error",)

    own_metrics: ClassVar[tuple[Key, ...]] = (
        Key(
            "reward_failed", "share",
            "of completions for which the reward failed (with `on_error: zero`)",
            "reward", lambda keys: keys.on_error == "zero",
        ),
    )  # fmt: skip

    on_error: Literal["fail", "zero"] = "fail"  # a call that fails ends the run, or earns its completions 0


class WorkerKeys(FallibleKeys):
    """Of a reward whose code runs in worker processes."""

    may_change: ClassVar[tuple[str, ...]] = ("on_error", "workers", "timeout_s")

    workers: PositiveInt = 2  # processes that call it, on the controller's machine
    timeout_s: PositiveFloat = 60.0  # of one call; a process's first call also imports the code


class VerifierKeys(WorkerKeys):
    """Of a verifier that is called for each completion by itself, and may take long over an odd one."""

    timeout_s: PositiveFloat = 30.0  # of one completion; a process's first one also loads the verifier
    on_error: Literal["fail", "zero"] = "zero"  # where it fails the run ends, or the completion earns 0
