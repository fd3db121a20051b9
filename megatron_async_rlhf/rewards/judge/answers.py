"""What a judge has answered, on disk, and what it has cost: one SQLite file, which several runs may share."""

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from megatron_async_rlhf.config.judge import JudgeBudget
from megatron_async_rlhf.errors import JudgeBudgetError, JudgeError

_T = TypeVar("_T")
_LOCKED_S = 30.0  # another process that writes takes milliseconds
_TABLES = """
create table if not exists answers (key text primary key, request text, text text, cut integer);
create table if not exists spent (only integer primary key check (only = 1), calls integer, tokens integer);
insert or ignore into spent values (1, 0, 0);
"""


class Answer(Struct, frozen=True, kw_only=True):
    """Of an endpoint.

    Attributes:
        cut: it ended because it was as long as it may be.
    """

    text: str
    cut: bool


def key_of(request: Mapping[str, Any]) -> str:
    """Equal for equal requests; the model is a part of them."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerStore:
    """The file is made with the first question. No method holds up the event loop.

    All raise JudgeError if the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None
        self._one_at_a_time = threading.Lock()

    async def find(self, request: Mapping[str, Any]) -> Answer | None:
        query = "select text, cut from answers where key = ?"
        row = await self._run(lambda database: database.execute(query, (key_of(request),)).fetchone())
        return None if row is None else Answer(text=row[0], cut=bool(row[1]))

    async def keep(self, request: Mapping[str, Any], answer: Answer, tokens: int) -> None:
        def keep(database: sqlite3.Connection) -> None:
            row = (key_of(request), json.dumps(request), answer.text, answer.cut)
            database.execute("insert or replace into answers values (?, ?, ?, ?)", row)
            database.execute("update spent set tokens = tokens + ?", (tokens,))

        await self._run(keep)

    async def spend_call(self, budget: JudgeBudget, key: str) -> None:
        """Count one more call.

        Args:
            key: of `budget` in the configuration.

        Raises:
            JudgeBudgetError: it would be one too many.
        """
        limits = {"calls": budget.max_calls, "tokens": budget.max_tokens}

        def spend(database: sqlite3.Connection) -> tuple[str, int] | None:
            database.execute("begin immediate")  # another process may be about to spend the same call
            spent = dict(zip(limits, database.execute("select calls, tokens from spent").fetchone(), strict=True))
            for what, limit in limits.items():
                if limit is not None and spent[what] >= limit:
                    return what, spent[what]
            database.execute("update spent set calls = calls + 1")
            return None

        if (over := await self._run(spend)) is not None:
            what, number = over
            raise JudgeBudgetError(
                f"the budget is spent: {number} {what}, {key}.max_{what} = {limits[what]}. Raise it and continue (--resume of "
                f"a run): what has been judged is in {self.path} and is not asked again"
            )

    async def give_back_call(self) -> None:
        """Of a request that the endpoint refused to work on."""
        await self._run(lambda database: database.execute("update spent set calls = calls - 1"))

    async def _run(self, what: Callable[[sqlite3.Connection], _T]) -> _T:
        return await asyncio.to_thread(self._transaction, what)

    def _transaction(self, what: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            with self._one_at_a_time:
                if self._database is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._database = sqlite3.connect(self.path, timeout=_LOCKED_S, check_same_thread=False)
                    self._database.executescript(_TABLES)
                with self._database as database:
                    return what(database)
        except (OSError, sqlite3.Error) as error:
            raise JudgeError(f"the cache {self.path} cannot be used: {error}") from None
