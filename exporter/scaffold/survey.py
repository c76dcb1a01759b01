"""The tables of a core database that could be landed, and what its catalog says about how."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config.keys import snake_case
from exporter.errors import SourceError, nearest
from exporter.source import Column, window
from exporter.source.catalog import columns_of
from exporter.source.lookup import Index, indexes, planned_rows
from exporter.wire import Connection

_PATIENCE = 2000  # milliseconds that one question may take
_COUNTED = 1000  # rows
# Not the parts of a partitioned table, and not what an extension keeps for itself.
_RELATIONS = """
select c.oid, n.nspname, c.relname, c.relkind::text, obj_description(c.oid, 'pg_class'),
    c.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = c.oid)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p', 'v', 'm', 'f') and not c.relispartition and c.relpersistence <> 't'
    and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    and not exists (select from pg_depend d
        where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
order by n.nspname <> 'public', n.nspname, c.relname
"""
_FACTS = """
select a.attname, col_description(a.attrelid, a.attnum),
    a.attidentity <> '' or coalesce(pg_get_expr(d.adbin, d.adrelid) like 'nextval(%%', false),
    (select concat(nullif(n.nspname, 'public') || '.', c.relname, '.', r.attname)
        from pg_constraint f
        join pg_attribute r on r.attrelid = f.confrelid and r.attnum = f.confkey[1]
        join pg_class c on c.oid = f.confrelid join pg_namespace n on n.oid = c.relnamespace
        where f.conrelid = a.attrelid and f.contype = 'f' and f.conkey = array[a.attnum]
        order by f.oid limit 1),
    array(select e.enumlabel::text from pg_enum e where e.enumtypid = a.atttypid
        order by e.enumsortorder)
from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = %s and a.attnum > 0 and not a.attisdropped
"""
_WHEN = "(at|on|date|time|ts|timestamp|datetime|utc)*"
_CHANGED = re.compile(
    "(date|time|row|record|sys|system|db)?(last)?"
    f"(update|updated|modified|modification|modify|changed|change|mod|edited|write|mtime){_WHEN}"
)
_PERHAPS_CHANGED = re.compile("updat|modif|chang|edit")
_CREATED = re.compile(
    "(date|time)?(create|created|creation|insert|inserted|added|occurred|logged|recorded|received"
    f"|ingested|event|log){_WHEN}|timestamp|ts"
)


class Fact(NamedTuple):
    """What the catalog says of a column beside its type."""

    comment: str | None
    generated: bool  # by a sequence: a later row has a greater value
    references: str | None
    labels: tuple[str, ...]  # of an enum


class Relation(NamedTuple):
    """A table or view of the source. ``comment`` is the database's own on it."""

    oid: int
    schema: str
    name: str
    kind: str  # pg_class.relkind
    comment: str | None
    inherited: bool = False  # by tables that are no partitions: no key of its own holds for theirs
    columns: tuple[Column, ...] = ()
    facts: dict[str, Fact] | None = None
    indexes: tuple[Index, ...] = ()

    def __str__(self) -> str:
        return self.name if self.schema == "public" else f"{self.schema}.{self.name}"

    @property
    def can_be_scanned(self) -> bool:
        """Whether its rows tell their transactions: those of views and foreign tables do not."""
        return self.kind in ("r", "p", "m")

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that tell its rows apart; none where the catalog knows none."""
        if self.inherited:
            return ()
        required = {column.name for column in self.columns if column.not_null}
        keys = (i.columns for i in self.indexes if i.unique and required.issuperset(i.columns))
        return next(keys, ())


class Cursors(NamedTuple):
    """The columns that may serve as the cursor. ``sure``: the first one needs no question."""

    names: tuple[str, ...]
    sure: bool


def relations(source: Connection) -> list[Relation]:
    """Return the tables and views, without their columns; those of the schema public first."""
    return [Relation(*row) for row in source.execute(_RELATIONS)]


def described(source: Connection, relation: Relation) -> Relation:
    """Return a relation with its columns, their facts and its indexes."""
    facts = {
        name: Fact(comment, generated, references, tuple(labels))
        for name, comment, generated, references, labels in source.execute(_FACTS, (relation.oid,))
    }
    return relation._replace(
        columns=columns_of(source, relation.oid),
        facts=facts,
        indexes=tuple(indexes(source, relation.oid)),
    )


def find(everything: list[Relation], wanted: str) -> Relation:
    """Return the relation that a person means: its case, its plural or its schema may differ.

    Raises SourceError.
    """
    plain = wanted.replace('"', "")
    alike: tuple[Callable[[str], str], ...] = (str, str.lower, _folded)
    for form in alike:
        found = [
            relation
            for relation in everything
            if form(plain) in (form(relation.name), form(f"{relation.schema}.{relation.name}"))
        ]
        for candidates in (found, [it for it in found if it.schema == "public"]):
            if len(candidates) == 1:
                return candidates[0]
        if found:
            names = " or ".join(map(str, found))
            raise SourceError(f"{wanted} may be any of several tables", hint=f"name one: {names}")
    known = [str(relation) for relation in everything]
    raise SourceError(f"the source database has no table {wanted}", hint=nearest(wanted, known))


def _folded(name: str) -> str:
    """Return one form for `OrderLines`, `order_line` and `order lines`."""
    parts = [snake_case(part).replace("_", "") for part in name.split(".")]
    last = parts.pop()
    for plural, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("s", "")):
        if last.endswith(plural) and not last.endswith("ss"):
            last = last[: -len(plural)] + singular
            break
    return ".".join([*parts, last])


def cursors(relation: Relation) -> Cursors:
    """Decide which columns may be the cursor, by their types, their names and their defaults."""
    facts = relation.facts or {}
    times = [column.name for column in relation.columns if window.is_time(column)]
    numbers = [column.name for column in relation.columns if window.is_number(column)]
    changed = [name for name in times if _CHANGED.fullmatch(_plain(name))]
    if changed:
        return Cursors(tuple(changed), len(changed) == 1)
    perhaps = [name for name in times if _PERHAPS_CHANGED.search(_plain(name))]
    counted = [
        name
        for name in numbers
        if not facts[name].references and (facts[name].generated or relation.key == (name,))
    ]
    created = [name for name in times if _CREATED.fullmatch(_plain(name))]
    names = tuple(dict.fromkeys([*perhaps, *counted, *created]))
    sure = not perhaps and (len(counted) == 1 or (not counted and len(created) == 1))
    return Cursors(names or (*times, *numbers), sure)


def hint(source: Connection, relation: Relation) -> str | None:
    """Return the cursor of a table that needs none: no doubt about it, an index, and no nulls.

    A log has none: its transactions tell its rows, which no clock delays.
    """
    found = cursors(relation)
    indexed = {index.columns[0] for index in relation.indexes}
    if not relation.key or not found.sure or found.names[0] not in indexed:
        return None
    name = found.names[0]
    good = grows_with_changes(relation, name) and not has_nulls(source, relation, name)
    return name if good else None


def may_be_cursor(column: Column) -> bool:
    """Whether the column's type is one that a cursor may have."""
    return window.is_time(column) or window.is_number(column)


def grows_with_changes(relation: Relation, name: str) -> bool:
    """Whether the cursor's value grows also when a row is changed, not only when it is inserted."""
    column = next(column for column in relation.columns if column.name == name)
    fact = (relation.facts or {})[name]
    if window.is_number(column):
        return not fact.generated and relation.key != (name,)
    return not _CREATED.fullmatch(_plain(name))


def estimate(source: Connection, relation: Relation) -> int | None:
    """Return about how many rows it has; None where the role may not read it.

    A few rows are counted; of more, the planner's estimate is given.
    """
    query = sql.SQL("select from {}").format(sql.Identifier(relation.schema, relation.name))
    try:
        if relation.kind in ("r", "p", "m"):
            with source.transaction():
                source.execute(f"set local statement_timeout = {_PATIENCE}")
                some = sql.SQL("select count(*) from ({} limit {}) some_rows")
                row = source.execute(some.format(query, _COUNTED + 1)).fetchone()
            if row and row[0] <= _COUNTED:
                return int(row[0])
        return planned_rows(source, query)
    except psycopg.Error:
        return None


def has_nulls(source: Connection, relation: Relation, name: str) -> bool:
    """Whether some row has no cursor value; False where the source does not answer soon."""
    column = next(column for column in relation.columns if column.name == name)
    if column.not_null or relation.kind not in ("r", "p", "m"):
        return False
    query = sql.SQL("select from {} where {} is null limit 1").format(
        sql.Identifier(relation.schema, relation.name), sql.Identifier(name)
    )
    try:
        with source.transaction():
            source.execute(f"set local statement_timeout = {_PATIENCE}")
            return source.execute(query).fetchone() is not None
    except psycopg.Error:
        return False


def _plain(name: str) -> str:
    return snake_case(name).replace("_", "")
