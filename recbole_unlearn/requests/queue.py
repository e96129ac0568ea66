"""Deletion requests in one SQLite file: what was asked when, what became of it, and tokens only until it is done."""

import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from recbole_unlearn.errors import InputError
from recbole_unlearn.requests.secret import Secret
from recbole_unlearn.storage.files import check_regular, now

APPLICATION, SCHEMA = 0x52557175, 1  # in the file's header: "RUqu", and the version of the tables
TABLES = (
    "CREATE TABLE queue (secret TEXT NOT NULL, origin TEXT, checkpoint TEXT)",
    # facts: what receipts tell of a batch; none while it is open
    "CREATE TABLE batches (id TEXT PRIMARY KEY, started TEXT NOT NULL, checkpoint TEXT NOT NULL, folder TEXT NOT NULL, "
    "audit TEXT NOT NULL, before TEXT NOT NULL, keys TEXT NOT NULL, facts TEXT)",
    # tokens: a JSON list; none once it is done
    "CREATE TABLE requests (id TEXT PRIMARY KEY, kind TEXT NOT NULL, tokens TEXT, mark TEXT NOT NULL, "
    "received TEXT NOT NULL, due TEXT NOT NULL, state TEXT NOT NULL, reason TEXT, interactions INTEGER, batch TEXT, "
    "done TEXT)",
)
WAITING = ("pending", "failed")  # of these the tokens are kept
STATES, KINDS = (*WAITING, "done", "withdrawn"), ("user", "item", "pair")
NOTHING_LEFT = "nothing of it was left"
NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)
MAX_DAYS = 36_500


class Queue:
    """An open queue.

    Args:
        path: its file.
        key_file: of the operator's secret, where that is needed.
        new: whether to make queue and secret where there is no queue.

    Raises:
        InputError: no queue, a foreign or damaged file, a later version's, or another secret than it began with.
    """

    def __init__(self, path: Path | str, key_file: Path | None = None, new: bool = False):
        self.path = Path(path).absolute()
        self._secret: Secret | None = None
        try:
            if new and not self.path.exists():  # SQLite would let others read it
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            check_regular(self.path)
        except FileNotFoundError:
            raise InputError(f"queue {path} does not exist; add a request, in a folder that exists") from None
        except OSError as error:
            raise InputError(f"queue {path} cannot be opened ({error.strerror})") from None
        with self._in_one_line():
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            try:
                self._open(key_file, new)
            except BaseException:
                self._connection.close()
                raise

    def _open(self, key_file, new):
        application, schema = (self._one(f"PRAGMA {name}")[0] for name in ("application_id", "user_version"))
        empty = not application and not schema and not self._one("SELECT count(*) FROM sqlite_master")[0]
        if not empty and application != APPLICATION:
            raise InputError(f"{self.path} is no queue of recbole_unlearn; name another file")
        if empty and not new:
            raise InputError(f"queue {self.path} is empty; add a request first")
        if schema > SCHEMA:
            raise InputError(f"queue {self.path} is of a later version of recbole_unlearn; install that")
        # what is deleted is overwritten, and no copy of it outlives its transaction: no write-ahead log, and a rollback
        # journal that is gone with the commit
        for setting in ("secure_delete=ON", "journal_mode=DELETE", "temp_store=MEMORY", "trusted_schema=OFF"):
            self._run(f"PRAGMA {setting}").fetchall()
        check = None if empty else self._one("SELECT secret FROM queue")[0]
        if key_file:
            self._secret = Secret.made(key_file) if empty else Secret.read(key_file)
        if empty:
            self._make()
            check = self._one("SELECT secret FROM queue")[0]  # another process may have been first
        if self._secret and self._secret.check != check:
            raise InputError(f"{key_file} is not the key file that queue {self.path} began with; put that back")

    def _make(self):
        with self.transaction():
            if self._one("PRAGMA user_version")[0]:  # another process was first
                return
            for table in TABLES:
                self._run(table)
            self._run("INSERT INTO queue VALUES (?, NULL, NULL)", self.secret.check)
            self._run(f"PRAGMA application_id={APPLICATION}")
            self._run(f"PRAGMA user_version={SCHEMA}")

    @property
    def secret(self) -> Secret:
        """The operator's, if it was opened with the key file."""
        assert self._secret
        return self._secret

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, statement, *values):
        return self._connection.execute(statement, values)

    def _one(self, statement, *values):
        return self._run(statement, *values).fetchone()

    @contextmanager
    def _in_one_line(self):
        try:
            yield
        except InputError:
            raise
        except (sqlite3.Error, ValueError) as error:  # a damaged file may hold anything
            raise InputError(f"queue {self.path} cannot be used ({error})") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is changed within happens, or nothing of it."""
        with self._in_one_line():
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._run("ROLLBACK")
                raise

    # -- requests

    def add(
        self, kind: str, tokens: list[str], name: str | None = None, days: int = 30, received: str | None = None
    ) -> str:
        """Take a request in; returns, in words, what became of it.

        Args:
            days: that there are until it is due, since it was ``received``.
            received: date in ISO's form; None: now.

        Raises:
            InputError: a name, token, date or number of days that cannot be; another request has the name.
        """
        name = secrets.token_hex(6) if name is None else name
        if not NAME.fullmatch(name):
            raise InputError(f"id {name!r} must be 1 to 64 letters, digits and _ . : -")
        if name in tokens:
            raise InputError("the id is the token that the request names, and would stay on record; name another")
        if not all(token.strip() for token in tokens):
            raise InputError("a token is empty: it names nobody")
        if not 0 <= days <= MAX_DAYS:
            raise InputError(f"due must be 0 to {MAX_DAYS} days, not {days}")
        mark, came = self.secret.mark(name, kind, tokens), _moment(received)
        due = (datetime.fromisoformat(came) + timedelta(days=days)).isoformat()
        content = kind, json.dumps(tokens), mark
        with self.transaction():
            known = self._one("SELECT * FROM requests WHERE id = ?", name)
            if known is None:
                columns = "id, received, due, state, kind, tokens, mark"
                self._run(f"INSERT INTO requests ({columns}) VALUES (?,?,?,'pending',?,?,?)", name, came, due, *content)
                return f"{name}: added, due {due}"
            if known["state"] == "failed":  # to be tried again, perhaps without the mistake
                again = "kind = ?, tokens = ?, mark = ?, state = 'pending', reason = NULL"
                self._run(f"UPDATE requests SET {again} WHERE id = ?", *content, name)
                return f"{name}: had failed, pending again, due {known['due']}"
            if known["state"] == "withdrawn":
                raise InputError(
                    f"{name} is the id of a request that was withdrawn, which stays on record; name another"
                )
            if known["mark"] != mark:
                raise InputError(f"{name} is the id of another request; name another")
        return f"{name}: added before, {known['state']}; nothing changed"

    def withdraw(self, name: str) -> str:
        """Take a request back that is pending or failed: its tokens go, that it was there and when it went stays.

        Raises:
            InputError: it is done, withdrawn before, or being served.
        """
        with self.transaction():
            found = self.request(name)
            if found["state"] not in WAITING:
                raise InputError(f"request {name} is {found['state']}; it stays on record")
            if found["batch"]:
                raise InputError(f"request {name} is being served, or was when a process was killed: serve first")
            moment = now()
            gone = "state = 'withdrawn', tokens = NULL, reason = ?"
            self._run(f"UPDATE requests SET {gone} WHERE id = ?", f"{found['state']} until {moment}", name)
        self.compact()
        return f"{name}: withdrawn at {moment}"

    def forgotten(self, kind: str, tokens: Sequence[str]) -> bool:
        """Whether a request that is done was for the same."""
        return any(
            each["mark"] == self.secret.mark(each["id"], kind, tokens)
            for each in self.requests("done")
            if each["kind"] == kind
        )

    def requests(self, state: str | None = None, batch: str | None = None) -> list[sqlite3.Row]:
        """Those of a state, or of a batch, in the order in which they came."""
        with self._in_one_line():
            chosen = "(?1 IS NULL OR state = ?1) AND (?2 IS NULL OR batch = ?2)"
            return self._run(f"SELECT * FROM requests WHERE {chosen} ORDER BY received, rowid", state, batch).fetchall()

    def request(self, name: str) -> sqlite3.Row:
        """InputError where there is none of this name."""
        with self._in_one_line():
            found = self._one("SELECT * FROM requests WHERE id = ?", name)
        if found is None:
            raise InputError(f"queue {self.path} holds no request {name!r}")
        return found

    # -- batches

    @property
    def checkpoints(self) -> tuple[str | None, str | None]:
        """The one that it began with, and the one that the next batch starts from; None before the first batch."""
        with self._in_one_line():
            return tuple(self._one("SELECT origin, checkpoint FROM queue"))

    def served(self, checkpoint: str) -> bool:
        """Whether a checkpoint is the one from before a batch."""
        with self._in_one_line():
            found = self._run("SELECT before FROM batches WHERE facts IS NOT NULL").fetchall()
            return self.secret.checksum(checkpoint) in (each[0] for each in found)

    def open_batch(self) -> sqlite3.Row | None:
        """The batch that was begun and is not known to be done."""
        with self._in_one_line():
            return self._one("SELECT * FROM batches WHERE facts IS NULL")

    def facts(self, batch: str) -> dict[str, Any]:
        """What receipts tell of a batch."""
        with self._in_one_line():
            return json.loads(self._one("SELECT facts FROM batches WHERE id = ?", batch)[0])

    def begin(
        self,
        batch: dict[str, str],
        origin: str,
        served: dict[str, int],
        refused: dict[str, str],
        done: dict[str, str | None],
        left: dict[str, str],
    ) -> set[str]:
        """Write down, before any work, what is about to be served.

        Args:
            batch: columns of the table, but for its facts.
            origin: the checkpoint that the queue began with.
            served: number of interactions of each request of the batch.
            refused: why others cannot be served.
            done: others, for which there is nothing to do, and why, or what is left, where that is to be told.
            left: what is left of some of those that are served.

        Returns:
            Ids of those that are pending still; nothing is written down of others, which were withdrawn meanwhile.
        """
        with self.transaction():
            pending = {each["id"] for each in self.requests("pending")}
            for name in refused.keys() & pending:
                self._run("UPDATE requests SET state = 'failed', reason = ? WHERE id = ?", refused[name], name)
            finished = "state = 'done', tokens = NULL, interactions = 0, done = ?, reason = ?"
            for name in done.keys() & pending:
                self._run(f"UPDATE requests SET {finished} WHERE id = ?", now(), done[name], name)
            for name in served.keys() & pending:
                values = batch["id"], served[name], left.get(name)
                self._run("UPDATE requests SET batch = ?, interactions = ?, reason = ? WHERE id = ?", *values, name)
            if served.keys() & pending:
                names = ", ".join(batch)
                values = ", ".join("?" * len(batch))
                self._run(f"INSERT INTO batches ({names}) VALUES ({values})", *batch.values())
            self._run("UPDATE queue SET origin = ?, checkpoint = ?", origin, batch["checkpoint"])
        return pending

    def give_back(self, batch: str) -> None:
        """Its requests are pending as before: nothing of it was done."""
        with self.transaction():
            self._run("UPDATE requests SET batch = NULL, interactions = NULL, reason = NULL WHERE batch = ?", batch)
            self._run("DELETE FROM batches WHERE id = ?", batch)

    def done(self, batch: str, facts: dict[str, Any], checkpoint: str) -> None:
        """A batch is served: its tokens are gone from here, and the next one starts from its checkpoint."""
        with self.transaction():
            served = "state = 'done', tokens = NULL, done = ?"
            self._run(f"UPDATE requests SET {served} WHERE batch = ?", facts["time"], batch)
            self._run("UPDATE batches SET facts = ? WHERE id = ?", json.dumps(facts), batch)
            self._run("UPDATE queue SET checkpoint = ?", checkpoint)

    def compact(self) -> None:
        """Write the file anew: what SQLite moved within it before a deletion may have left copies."""
        with self._in_one_line():
            self._run("VACUUM")


def _moment(received):
    """When a request came, UTC: at the beginning of a day, or now. InputError where that is no day until today."""
    moment = now()
    if received is None:
        return moment
    try:
        day = date.fromisoformat(received)
    except ValueError:
        day = None
    if day is None or day > max(date.today(), datetime.fromisoformat(moment).date()):
        raise InputError(f"received must be a day until today, such as 2026-01-31, not {received!r}")
    return min(datetime(day.year, day.month, day.day, tzinfo=timezone.utc).isoformat(), moment)
