"""Answers that were paid for once: one SQLite file, safe for several processes, every write atomic."""

import hashlib
import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf.errors import UserError

TIMEOUT = 60.0  # seconds to wait for another process that writes
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of a question: everything the answer depends on, and nothing else (no address, no secret)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class AnswerCache:
    """A table from questions to answers (JSON objects) on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # one connection, shared by all threads of this process
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # no isolation level: each statement is its own transaction
            self._connection = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._connection.close)
            self._write_ahead()
            self._execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; only a power cut the last answers
            self._execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the guide's cache {path} cannot be opened ({error}): choose another guide.cache.") from None

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a question, if it was ever given."""
        rows = self._execute("SELECT answer FROM answers WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def put(self, key: str, answer: Mapping[str, Any], replace: bool = False) -> bool:
        """Keep an answer; False where there is one already.

        The first one stays (but for `replace`): processes that asked the same go on with the same text.
        """
        rule = "REPLACE" if replace else "IGNORE"
        with self._lock:
            done = self._connection.execute(f"INSERT OR {rule} INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
            return done.rowcount > 0

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM answers")[0][0])

    def _write_ahead(self) -> None:
        """Let readers and a writer work side by side.

        While another process does the same to a new file, SQLite says "locked" at once, whatever the timeout (waiting
        inside it could be waiting for each other), so the wait is here.
        """
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _execute(self, statement: str, *values: str) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()
