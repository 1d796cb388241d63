"""The cache of server responses: one SQLite file, safe for several processes.

Every write is atomic, every row has a checksum, and no response is billed twice.
"""

import hashlib
import json
import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from rlgf.errors import ConfigError, TrainingError

TIMEOUT = 60.0  # seconds to wait for a write of another process
SCHEMA = "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, response TEXT NOT NULL, crc32 INTEGER NOT NULL)"
TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "text": str, "finished": bool, "ids": list, "invalid": str, "silent": bool, "given_up": str, "took": dict, "mode": str,
    "exact": bool, "refused": bool, "final": bool,
}  # fmt: skip
"""The entries of stored responses and of records of a run, and their types."""
COMPLETE = ({"text", "finished"}, {"invalid", "silent"}, {"given_up"}, {"took"}, {"mode"}, {"exact"})
"""Sets of entries of which every row has one at least."""


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the cache key of a request: a hash of everything its response depends on.

    The address and secrets are not part of it.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class ResponseCache:
    """A table on disk from request keys to responses (JSON objects).

    `role` names the server in errors, 'guide' or 'judge'. `report` is called with a warning for a
    damaged row, which is renamed and counts as missing.
    """

    def __init__(self, path: Path, role: str = "guide", report: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.role, self._report = path, role, report
        self._lock = threading.Lock()  # one connection, shared by all threads of this process
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # no isolation level: each statement is its own transaction
            self._connection = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._connection.close)
            self._write_ahead()
            # a killed process loses nothing; a power failure may lose the last responses
            self._run("PRAGMA synchronous = NORMAL")
            if ("answers",) in self._run(TABLES).rows:
                raise ConfigError(f"the {role}'s cache {path} is of an earlier rlgf: choose another {role}.endpoint.cache.")
            self._run(SCHEMA)
            self._run("SELECT key, response, crc32 FROM responses LIMIT 1")  # it may be another table of that name
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the {role}'s cache {path} cannot be opened ({error}): choose another {role}.endpoint.cache."
            ) from None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored response of a key, or None."""
        rows = self._execute("SELECT response, crc32 FROM responses WHERE key = ?", key).rows
        if not rows:
            return None
        found = _read_row(key, *rows[0])
        if found is None:
            aside = f"{key}/damaged-{time.time_ns()}"
            self._execute("UPDATE responses SET key = ? WHERE key = ?", aside, key)
            self._report(f"warning: a response in the {self.role}'s cache {self.path} is damaged: it is requested again")
        return found

    def put(self, key: str, response: Mapping[str, Any], replace: bool = False) -> bool:
        """Store a response and return whether it was written.

        An existing response is kept unless `replace` is set, so that processes with the same
        request continue with the same completion.
        """
        text = json.dumps(response)
        statement = f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO responses (key, response, crc32) VALUES (?, ?, ?)"
        return self._execute(statement, key, text, _checksum(key, text)).rowcount > 0

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM responses").rows[0][0])

    def _write_ahead(self) -> None:
        """Enable write-ahead logging, so that reads and a write can run concurrently.

        While another process does this to a new file, SQLite reports "locked" immediately, whatever
        the timeout (waiting inside SQLite could deadlock); so this method waits.
        """
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._run("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _execute(self, statement: str, *values: str | int) -> "_Done":
        """Run a statement; raise `TrainingError` if the file cannot be read or written."""
        try:
            return self._run(statement, *values)
        except sqlite3.Error as error:
            raise TrainingError(
                f"the {self.role}'s cache {self.path} cannot be used ({error}): see to the disk and the file, and run the same "
                "command again; responses that it has are kept."
            ) from error

    def _run(self, statement: str, *values: str | int) -> "_Done":
        with self._lock:
            cursor = self._connection.execute(statement, values)
            return _Done(cursor.fetchall(), cursor.rowcount)


class _Done(NamedTuple):
    rows: list[Any]
    rowcount: int


def _checksum(key: str, text: str) -> int:
    return zlib.crc32(f"{key} {text}".encode())


def _read_row(key: str, text: Any, checksum: Any) -> dict[str, Any] | None:
    """Return the response in a row, or None if it is damaged or malformed."""
    if not isinstance(text, str) or checksum != _checksum(key, text):
        return None
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    row = cast("dict[str, Any]", found)
    is_known = all(isinstance(value, TYPES.get(name, object)) for name, value in row.items())
    return row if is_known and any(entries <= row.keys() for entries in COMPLETE) else None
