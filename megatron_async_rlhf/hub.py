"""What stands between us and a model or dataset of the Hugging Face hub, in one line that says what to do."""

from collections.abc import Iterator

_NETWORK = {"ConnectionError", "ConnectError", "TimeoutException", "ProxyError"}
_UNREACHABLE = _NETWORK | {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def hub_problem(error: BaseException, what: str, name: str) -> str | None:
    """The end of a message about `name`; None if the error is about something else.

    Libraries wrap these errors in their own, each version differently, so they are known by the names of their types.

    Args:
        what: `model` or `dataset`.
    """
    causes = [({kind.__name__ for kind in type(each).__mro__}, str(each)) for each in _causes(error)]
    kinds = set().union(*(names for names, _ in causes))
    texts = [text for _, text in causes]
    if "GatedRepoError" in kinds or any(f"gated {what}" in text for text in texts):
        return (
            f"the {what} {name} at the hub is gated: accept its terms on its page there, then log in with `hf auth login` or "
            "set HF_TOKEN"
        )
    if "RevisionNotFoundError" in kinds:
        return f"the {what} {name} at the hub has no such revision; correct what follows the @"
    if is_unreachable(error):
        missing = f"the {what} {name} is not in the cache, or only a part of it"
        return f"{missing}, and {_why_unreachable(causes)}"
    if {"RepositoryNotFoundError", "DatasetNotFoundError"} & kinds:
        return (
            f"there is no {what} {name} at the hub, or it is private; correct the name, or log in with `hf auth login`"
        )
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether it says that the hub could not be asked."""
    causes = list(_causes(error))
    names = {each.__name__ for cause in causes for each in type(cause).__mro__}
    return bool(names & _UNREACHABLE) or any("OfflineModeIsEnabled" in str(cause) for cause in causes)


def described(error: BaseException) -> str:
    """Type and first line of what a library raised."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first}"


def _why_unreachable(causes: list[tuple[set[str], str]]) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask the hub; unset it, or download it where there is a network"
    reasons = [text for names, text in causes if names & _NETWORK and text]
    reason = reasons[-1].splitlines()[0] if reasons else "no reason given"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the network, or download it elsewhere"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
