"""The cache of server responses: one SQLite file, safe for several processes.

Every write is atomic, and no response is billed twice.
"""

import hashlib
import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf.errors import ConfigError

TIMEOUT = 60.0  # seconds to wait for a write of another process
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the cache key of a request: a hash of everything its response depends on.

    The address and secrets are not part of it.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class ResponseCache:
    """A table on disk from request keys to responses (JSON objects).

    `role` names the server in errors, 'guide' or 'judge'.
    """

    def __init__(self, path: Path, role: str = "guide") -> None:
        self.path = path
        self._lock = threading.Lock()  # one connection, shared by all threads of this process
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # no isolation level: each statement is its own transaction
            self._connection = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._connection.close)
            self._write_ahead()
            # a killed process loses nothing; a power failure may lose the last responses
            self._execute("PRAGMA synchronous = NORMAL")
            self._execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the {role}'s cache {path} cannot be opened ({error}): choose another {role}.endpoint.cache."
            ) from None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored response of a key, or None."""
        rows = self._execute("SELECT answer FROM answers WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def put(self, key: str, answer: Mapping[str, Any], replace: bool = False) -> bool:
        """Store a response and return whether it was written.

        An existing response is kept unless `replace` is set, so that processes with the same
        request continue with the same completion.
        """
        rule = "REPLACE" if replace else "IGNORE"
        with self._lock:
            done = self._connection.execute(f"INSERT OR {rule} INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
            return done.rowcount > 0

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM answers")[0][0])

    def _write_ahead(self) -> None:
        """Enable write-ahead logging, so that reads and a write can run concurrently.

        While another process does this to a new file, SQLite reports "locked" immediately, whatever
        the timeout (waiting inside SQLite could deadlock); so this method waits.
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
