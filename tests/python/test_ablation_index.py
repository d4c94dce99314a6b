"""The SQLite index says what the JSONL files say, and is never needed."""

from __future__ import annotations

import json
import sqlite3

import pytest

from torch_pnn.ablation import index
from torch_pnn.ablation.index import Index


def _result(arm, seed, status="finished", **changes):
    return {"arm": arm, "seed": seed, "status": status, "accuracy": 0.5 + seed / 10, "correct": 3, **changes}


def _append(path, *rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _query(folder, question):
    connection = sqlite3.connect(folder / index.NAME)
    try:
        return connection.execute(question).fetchall()
    finally:
        connection.close()


@pytest.fixture
def folder(tmp_path):
    _append(tmp_path / "results.jsonl", _result("pnn", 0), _result("it's", 0), _result("pnn", 1, shifted={"1": 0.25}))
    _append(tmp_path / "epochs.jsonl", *({"arm": "pnn", "seed": 0, "epoch": e, "test_score": e / 10} for e in (1, 2)))
    return tmp_path


ROWS = "SELECT arm, seed, status, accuracy FROM results ORDER BY arm, seed"
FIRST = [("it's", 0, "finished", 0.5), ("pnn", 0, "finished", 0.5), ("pnn", 1, "finished", 0.6)]


def test_it_says_what_the_files_say(folder):
    held = Index(folder)
    held.refresh()
    assert _query(folder, ROWS) == FIRST
    assert _query(folder, "SELECT arm, avg(accuracy) FROM results GROUP BY arm") == [("it's", 0.5), ("pnn", 0.55)]
    assert _query(folder, "SELECT json_extract(row, '$.shifted.\"1\"') FROM results WHERE seed = 1") == [(0.25,)]
    assert _query(folder, "SELECT epoch, test_score, train_loss FROM epochs") == [(1, 0.1, None), (2, 0.2, None)]
    for (text,) in _query(folder, "SELECT row FROM results"):
        assert text.encode() in (folder / "results.jsonl").read_bytes()
    held.close()
    assert not list(folder.glob("index.sqlite-*"))


def test_it_takes_in_what_was_appended_and_no_half_line(folder):
    held = Index(folder)
    held.refresh()
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"arm": "pnn", "se')
    held.refresh()
    assert _query(folder, ROWS) == FIRST
    with open(folder / "results.jsonl", "a") as file:
        file.write('ed": 2, "status": "broken"}\n')
    held.refresh()
    assert _query(folder, ROWS) == [*FIRST, ("pnn", 2, "broken", None)]
    # A later row replaces an earlier one, but one that broke does not replace one that ended.
    _append(folder / "results.jsonl", _result("pnn", 2), _result("pnn", 2, "broken", accuracy=None))
    held.refresh()
    assert _query(folder, ROWS) == [*FIRST, ("pnn", 2, "finished", 0.7)]
    held.close()


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "cut", "another version", "rows taken out"])
def test_it_is_made_anew_where_it_does_not_fit(folder, damage):
    held = Index(folder)
    held.refresh()
    held.close()
    path = folder / index.NAME
    expected = FIRST
    if damage == "deleted":
        path.unlink()
    elif damage == "overwritten":
        path.write_bytes(b"no data base" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "another version":
        connection = sqlite3.connect(path)
        connection.execute("DROP TABLE results")
        connection.execute("CREATE TABLE results (x)")
        connection.execute("PRAGMA user_version = 77")
        connection.commit()
        connection.close()
    else:
        rows = (folder / "results.jsonl").read_text().splitlines(keepends=True)
        (folder / "results.jsonl").write_text("".join(rows[1:]))
        expected = [FIRST[0], FIRST[2]]
    held = Index(folder)
    held.refresh()
    held.close()
    assert _query(folder, ROWS) == expected


def test_it_is_given_up_where_it_can_not_be_had(folder, monkeypatch):
    (folder / index.NAME).mkdir()
    held = Index(folder)
    held.refresh()
    held.refresh()
    held.close()
    monkeypatch.setattr(index, "sqlite3", None)
    held = Index(folder)
    held.refresh()
    held.close()
