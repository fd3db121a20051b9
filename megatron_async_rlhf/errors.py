"""The exception tree. Every message says what failed, where, and what to do about it, in one line."""


class AsyncRLHFError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(AsyncRLHFError, ValueError):
    """A configuration that cannot run: names the key, its value and the rule it breaks."""


class DataError(AsyncRLHFError, ValueError):
    """Prompts or solutions that cannot be used: names the file and the line."""


class UnreachableError(DataError):
    """Data at a hub that this machine cannot ask, and has no copy of."""


class RecordError(DataError):
    """One record that cannot be used, among others that can: names the file and the line.

    Attributes:
        reason: in a few words, the same for all records with this fault: they are counted by it.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class MappingError(AsyncRLHFError, ValueError):
    """Weights that do not fit the architecture they are mapped to: names the tensor and both shapes."""


class CheckpointError(AsyncRLHFError, ValueError):
    """Weight files that cannot be read or written: names the file, and the tensor or the rule it breaks."""


class WriteError(AsyncRLHFError, RuntimeError):
    """A file of the run that cannot be written, as on a full disk: names the file and the cause. What was complete stays."""


class TransferError(AsyncRLHFError, RuntimeError):
    """A weight push that failed or did not arrive byte for byte: names the phase, the peer and the tensor."""


class MismatchError(TransferError):
    """Weights arrived that are not the learner's, bit for bit.

    Attributes:
        compared: digests compared.
        mismatches: `generator rank: tensor[rows, columns] from learner rank` of every slice that differs.
    """

    def __init__(self, message: str, *, compared: int, mismatches: list[str]) -> None:
        super().__init__(message)
        self.compared, self.mismatches = compared, mismatches


class GeneratorError(AsyncRLHFError, RuntimeError):
    """A generator that is unreachable, too slow or answers nonsense: names the generator and the request."""


class GeneratorGoneError(GeneratorError):
    """A generator that did not answer at all: its process has ended, or it hangs."""


class GeneratorSilentError(GeneratorGoneError):
    """A generator whose process may be alive but that does nothing: it hangs, is stopped, or cannot be reached.

    Attributes:
        silent_s: for how long it has been waited for in vain.
    """

    def __init__(self, message: str, *, silent_s: float) -> None:
        super().__init__(message)
        self.silent_s = silent_s


class LearnerError(AsyncRLHFError, RuntimeError):
    """The learner group failed to execute a command: names the command and carries the rank's own error."""


class LearnerSilentError(LearnerError):
    """The learner did not answer in time: one of its ranks hangs, or waits for one that does.

    Attributes:
        silent_s: for how long it has been waited for in vain.
    """

    def __init__(self, message: str, *, silent_s: float) -> None:
        super().__init__(message)
        self.silent_s = silent_s


class NonFiniteLossError(LearnerError):
    """A loss or gradient norm that is not finite: names the step and the file the batch was saved to."""


class UserFunctionError(AsyncRLHFError, RuntimeError):
    """A function of the user's that cannot be imported or called. The message follows the function's name."""


class RewardError(AsyncRLHFError, RuntimeError):
    """A reward that gave no usable scores: names it, the prompt, and what it did instead."""


class JudgeError(RewardError):
    """A judge that could not be asked, or gave no verdict: names it, and what it answered."""


class JudgeBudgetError(JudgeError):
    """A judge that may not be asked any more: names the limit and how to continue."""


class StaleSampleError(AsyncRLHFError, AssertionError):
    """A sample older than `schedule.max_staleness` reached the learner: a bug in pacing, never a setting."""


class ProcessDiedError(AsyncRLHFError, RuntimeError):
    """A process of the run ended when it should not have: names it and quotes the end of its log."""


class DeadlockError(AsyncRLHFError, RuntimeError):
    """A simulation in which nothing can happen any more: a bug in scheduling. Names what every task waits in."""


class InvariantError(AsyncRLHFError, AssertionError):
    """A simulation that broke a promise of the schedule: a bug in scheduling. Names the promise and the group."""


class ReplayError(AsyncRLHFError, RuntimeError):
    """Training again on recorded rollouts came out differently."""


class RunError(AsyncRLHFError, RuntimeError):
    """A run that was started from Python and failed: says where and why."""


class SubmissionError(AsyncRLHFError, RuntimeError):
    """Jobs that could not be handed over, or not be followed: names the command, and what was submitted before."""
