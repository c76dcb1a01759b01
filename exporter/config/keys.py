"""The keys of a definition: what each means, and how its value is read from the YAML."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from exporter.errors import DefinitionError, nearest


class Key(NamedTuple):
    """A key of the definition, as validation and the reference page need it."""

    meaning: str
    default: Any = None  # taken where the YAML says nothing
    otherwise: str = "required"  # shown in the default's place where it is not one value


KEYS = {
    "key": Key("what `exporter load` is given", otherwise="`source.table`, as dbt names it"),
    "source.database": Key(
        "the database that is read: NAME for `DATABASE_URL_NAME`. Also once for all tables of a dbt"
        " source, as `config.meta.exporter.database`",
        "CORE",
    ),
    "source.schema": Key("schema at the source", "public"),
    "source.table": Key(
        "table, view or partitioned table at the source", otherwise="required, or `source.rows`"
    ),
    "source.rows": Key(
        "in place of `source.table`: a Python function that yields the rows, such as"
        " `readers.posthog:events`, in the dbt project's folder or installed",
        otherwise="none: a table is read",
    ),
    "source.in_order": Key(
        "with `source.rows`: the function yields rows in the order of the cursor, and each"
        " `batch_rows` of them are committed; else all rows of a load are committed at its end",
        False,
    ),
    "source.read": Key(
        "`scan`: the rows of new transactions, whatever is in them; `cursor`; `changes`: what the"
        " source's WAL says, deletes included; or `auto`: a scan without a cursor, and of a table"
        " up to `scan_below`, else the cursor and a sweep",
        "auto",
    ),
    "source.scan_below": Key("size up to which `auto` scans a table that has a cursor", "64 MB"),
    "source.sweep": Key(
        "within what time a table that is read by its cursor is looked over for rows that the"
        " cursor has passed over: a time, or `never`",
        "1 day",
    ),
    "source.cursor": Key("a hint where new rows are", otherwise="none: the table is scanned"),
    "source.cursor.field": Key(
        "column that grows with every change: a timestamp, date or integer",
        otherwise="required with `source.cursor`",
    ),
    "source.cursor.id_field": Key(
        "tie-breaker for rows that share a cursor value", otherwise="none"
    ),
    "source.cursor.lookback": Key(
        "how far behind a stamp may be that the database did not make: a time, or a number where"
        " the cursor is an integer. If it is set, it counts from the newest row where that is older"
        " than the oldest open transaction",
        otherwise="`5 minutes`; 0 for an integer and with `mode: append`",
    ),
    "source.cursor.nulls": Key("rows without a cursor: `error`, `skip` or `load`", "error"),
    "source.columns": Key(
        'columns to land; `{name: email_hash, expression: "md5(lower(email))"}` is computed by the'
        " source",
        otherwise="all",
    ),
    "source.exclude": Key("columns that do not leave the source", otherwise="none"),
    "conflict_columns": Key(
        "unique columns; the primary key of the raw table, in a history with `_lsn` and `_seq`",
        otherwise="the source's primary key, but none with `mode: append`",
    ),
    "mode": Key(
        "`upsert`, a mirror; `append`, an append-only log; or, with `read: changes`, `history`:"
        " every version of a row",
        otherwise="`upsert`; `append` with a cursor and without `conflict_columns`",
    ),
    "schema": Key(
        "what a change of the source's columns may do to raw: `evolve` or `freeze`", "evolve"
    ),
    "deletes": Key(
        "what becomes of rows that are gone at the source: `ignore`, `mark` (in `_deleted_at`) or"
        " `remove`; at each load that scans the table or reads its changes, else at"
        " `load --reconcile`",
        "ignore",
        otherwise="`ignore`; `remove` with `read: changes`",
    ),
    "batch_rows": Key("most rows of one transaction", 50_000),
    "distribution_column": Key(
        "on Citus: the column by which the raw table is distributed, one of `conflict_columns`",
        otherwise="the first of `conflict_columns`",
    ),
}
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_SIZES = {"kB": 1024, "MB": 1024**2, "GB": 1024**3, "TB": 1024**4}


class Values:
    """The values of a definition by their dotted names, as in KEYS. Errors name their place."""

    def __init__(self, meta: Any, where: str) -> None:
        self.where = where
        self._values: dict[str, Any] = {}
        self._add("", meta)
        self._add("source.", self._values.get("source"))
        if self.given("source.cursor"):
            self._add("source.cursor.", self._values["source.cursor"])

    def _add(self, prefix: str, group: Any) -> None:
        if not isinstance(group, dict):
            problem = "is required, a mapping" if group is None else "must be a mapping"
            self.fail(prefix.rstrip("."), problem)
        below = (name.removeprefix(prefix) for name in KEYS if name.startswith(prefix))
        known = list(dict.fromkeys(name.partition(".")[0] for name in below))
        for name, value in group.items():
            if name not in known:
                advice = nearest(snake_case(str(name)), known)
                self.fail(f"{prefix}{name}", f"is not a key of the exporter; {advice}")
            self._values[prefix + name] = value

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise DefinitionError."""
        place = f"exporter.{key}" if key else "exporter"
        raise DefinitionError(f"{self.where}: {place} {problem}")

    def given(self, key: str) -> bool:
        """Return whether the YAML says anything of it."""
        return self._values.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """Return what the YAML says, which may be null; else the default."""
        return self._values.get(key, KEYS[key].default if default is None else default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text that is not empty."""
        value = self.value(key, default)
        if value is None:
            self.fail(key, "is required")
        if not isinstance(value, str) or not value:
            self.fail(key, "must be text")
        return value

    def names(self, key: str, names: Any = None) -> tuple[str, ...]:
        """Return the names that the YAML lists, or check the given ones."""
        names = self.value(key) if names is None else names
        if names is None:
            return ()
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            self.fail(key, "must be a list of column names")
        if len(set(names)) != len(names):
            self.fail(key, "names a column twice")
        return tuple(names)

    def database(self, key: str, inherited: Any) -> str:
        """Return the NAME of DATABASE_URL_NAME; else what the whole source inherits."""
        name = self.value(key, inherited)
        if not isinstance(name, str) or not re.fullmatch("[A-Z][A-Z0-9_]*", name):
            likely = re.sub(r"\W", "_", str(name)).upper().removeprefix("DATABASE_URL_")
            self.fail(key, f"must be the NAME of a variable DATABASE_URL_NAME, such as {likely}")
        return name

    def columns(self, key: str) -> tuple[tuple[str, ...] | None, dict[str, str]]:
        """Return the plain names, None for all columns; and the computed ones' expressions."""
        value = self.value(key)
        if not isinstance(value, list):
            return self.names(key) or None, {}
        plain = [item for item in value if not isinstance(item, dict)]
        expressions: dict[str, str] = {}
        for item in value:
            if isinstance(item, dict):
                if sorted(item) != ["expression", "name"]:
                    self.fail(key, "must be names, or mappings with name and expression")
                for part, text in item.items():
                    if not isinstance(text, str) or not text:
                        self.fail(f"{key}.{part}", "must be text")
                expressions[item["name"]] = item["expression"]
        self.names(key, [*plain, *expressions])
        return tuple(plain), expressions

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the choices."""
        value = self.value(key, default)
        if value not in choices:
            self.fail(key, "must be one of " + ", ".join(choices))
        return str(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def positive(self, key: str) -> int:
        """Return a whole number above 0."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, "must be a whole number above 0")
        return value

    def lookback(self, key: str) -> timedelta | int | None:
        """Return a time or a number; None where the YAML says nothing."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        return self._time(key, value, "must be a time such as '5 minutes', or a number")

    def time_or_never(self, key: str) -> timedelta | None:
        """Return a time; None for never."""
        value = self.value(key)
        if value == "never":
            return None
        return self._time(key, value, "must be a time such as '1 day', or never")

    def _time(self, key: str, value: Any, problem: str) -> timedelta:
        found = re.fullmatch(r"(\d+) *(second|minute|hour|day)s?", str(value).strip())
        if not found:
            self.fail(key, problem)
        return timedelta(seconds=int(found[1]) * UNITS[found[2]])

    def size(self, key: str) -> int:
        """Return a size in bytes, as PostgreSQL spells it."""
        value = self.value(key)
        found = re.fullmatch(r"(\d+) *(kB|MB|GB|TB)", str(value).strip())
        if not found and value != 0:
            self.fail(key, "must be a size such as '64 MB' or '1 GB'")
        return int(found[1]) * _SIZES[found[2]] if found else 0


def snake_case(name: str) -> str:
    """Return ``invoice_id`` for ``InvoiceID``, ``order_lines`` for ``Order Lines``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"\W+", "_", words).strip("_").lower()
