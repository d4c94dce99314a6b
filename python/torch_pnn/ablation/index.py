"""The SQLite index of a study's folder: results.jsonl and epochs.jsonl again, for questions that a table answers.

    sqlite3 DIR/index.sqlite "SELECT arm, count(*), avg(accuracy) FROM results WHERE status = 'finished' GROUP BY arm"

It is never the only copy of anything. It notes how many bytes of each file it holds, takes in what was appended since,
and is made anew where that does not fit, where it is damaged, or where it is missing. So it is written without waiting
for the disk, and without a write-ahead log: that needs memory shared between processes, which network file systems
don't have. Only the process that holds the folder's ``main`` claim writes it; others may read it at any time.

Tables: ``results`` (arm, seed: the primary key) and ``epochs`` (arm, seed, epoch), each with the columns below and
``row``, the whole row as JSON: ``json_extract(row, '$.shifted')``. A later row of the same run replaces an earlier one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

try:
    import sqlite3
except ImportError:  # a Python that was built without it
    sqlite3 = None  # type: ignore[assignment]

Row = dict[str, Any]

NAME = "index.sqlite"
#: Raised with every change of the tables: an index of another version is made anew.
VERSION = 1

#: Table -> its columns beside the key and ``row``, with their types.
COLUMNS: dict[str, dict[str, str]] = {
    "results": {
        "status": "TEXT",
        "problem": "TEXT",
        "metric": "TEXT",
        "accuracy": "REAL",
        "correct": "INTEGER",
        "total": "INTEGER",
        "test_loss": "REAL",
        "best_epoch": "INTEGER",
        "best_accuracy": "REAL",
        "parameters": "INTEGER",
        "mask_bytes": "INTEGER",
        "macs": "INTEGER",
        "width": "INTEGER",
        "epochs": "INTEGER",
        "seconds_per_epoch": "REAL",
        "seconds": "REAL",
        "peak_memory_bytes": "INTEGER",
        "initial_sha256": "TEXT",
        "final_sha256": "TEXT",
        "invocation": "INTEGER",
    },
    "epochs": {
        "train_loss": "REAL",
        "train_accuracy_running": "REAL",
        "test_loss": "REAL",
        "test_score": "REAL",
        "validation_score": "REAL",
        "seconds": "REAL",
    },
}
KEYS = {"results": ("arm", "seed"), "epochs": ("arm", "seed", "epoch")}


class Index:
    """The index of a folder, kept up to date by its owner.

    Nothing here raises: an index that can't be written is given up, since it can be made at any time.

    Args:
        directory: the folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._connection: Any = None
        self._given_up = sqlite3 is None

    def refresh(self) -> None:
        """Takes in what was appended to the files since."""
        if self._given_up:
            return
        for attempt in range(2):
            try:
                self._refresh()
                return
            except (sqlite3.Error, OSError, ValueError):
                self.close()
                if attempt == 0:  # damaged: make it anew
                    for suffix in ("", "-journal"):
                        with contextlib.suppress(OSError):
                            os.unlink(self._directory / f"{NAME}{suffix}")
        self._given_up = True

    def _refresh(self) -> None:
        if self._connection is None:
            self._connection = _open(self._directory / NAME)
        with self._connection as connection:
            for table in COLUMNS:
                path = self._directory / f"{table}.jsonl"
                size = path.stat().st_size if path.exists() else 0
                (known,) = connection.execute("SELECT bytes FROM sources WHERE name = ?", (table,)).fetchone()
                if size < known:  # not only appended to: read it again
                    connection.execute(f"DELETE FROM {table}")
                    known = 0
                if size == known:
                    continue
                with open(path, "rb") as file:
                    file.seek(known)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                connection.executemany(_insert(table), [_values(table, line) for line in whole.splitlines()])
                connection.execute("UPDATE sources SET bytes = ? WHERE name = ?", (known + len(whole), table))

    def close(self) -> None:
        """Closes the file."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _open(path: Path) -> Any:
    connection = sqlite3.connect(path, timeout=1.0, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = OFF")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == VERSION:
        return connection
    with connection:
        for table in [*COLUMNS, "sources"]:
            connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.execute("CREATE TABLE sources (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID")
        for table, columns in COLUMNS.items():
            keys = KEYS[table]
            fields = [f"{key} {'TEXT' if key == 'arm' else 'INTEGER'} NOT NULL" for key in keys]
            fields += [f"{name} {kind}" for name, kind in columns.items()]
            key = ", ".join(keys)
            connection.execute(f"CREATE TABLE {table} ({', '.join(fields)}, row TEXT NOT NULL, PRIMARY KEY ({key}))")
            connection.execute("INSERT INTO sources VALUES (?, 0)", (table,))
        connection.execute(f"PRAGMA user_version = {VERSION}")
    return connection


def _insert(table: str) -> str:
    names = [*KEYS[table], *COLUMNS[table], "row"]
    # A run that broke does not take the place of the same run's end.
    guard = "WHERE excluded.status <> 'broken' OR results.status = 'broken'" if table == "results" else ""
    changes = ", ".join(f"{name} = excluded.{name}" for name in names)
    marks = ", ".join("?" * len(names))
    return (
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) "
        f"ON CONFLICT ({', '.join(KEYS[table])}) DO UPDATE SET {changes} {guard}"
    )


def _values(table: str, line: bytes) -> list[Any]:
    row: Row = json.loads(line)
    return [*(row.get(name) for name in [*KEYS[table], *COLUMNS[table]]), line.decode()]
