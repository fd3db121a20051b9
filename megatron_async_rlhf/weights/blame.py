"""Which of many accounts of one failed push to believe.

When a member falls silent or dies, everybody else fails too, each naming whom it waited for: generators that wait for
each other, learner ranks that wait for rank 0, which waits for the silent one. The cause is the member that is accused
and says nothing itself.
"""

import re
from collections.abc import Sequence

CONNECTION_GONE = "the connection is gone"
_ACCOUNT = re.compile(r"(?:from|to) (?P<accused>[^()]+?) failed on (?P<witness>[^:]+): ")


def account(what: str, peer: str, witness: str, cause: str) -> str:
    """The form all accounts have. `what` ends in a preposition: `send of round 3 (...) to`."""
    return f"{what} {peer} failed on {witness}: {cause}"


def root_cause(messages: Sequence[str]) -> str:
    """The message closest to the cause: an error of somebody's own before any accusation, an accusation of somebody
    silent before one of a fellow victim, silence before a connection that others closed, the earliest first.
    """
    accounts = [_ACCOUNT.search(message) for message in messages]
    witnesses = {found["witness"] for found in accounts if found}

    def distance(index: int) -> tuple:
        found = accounts[index]
        return (
            found is not None,
            found is not None and found["accused"] in witnesses,
            CONNECTION_GONE in messages[index],
        )

    return messages[min(range(len(messages)), key=distance)]
