"""What the type of a source's column becomes in raw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from exporter.wire import Connection

TEXTS = ("text", "text[]")
# Their values mean something within one server alone, or have no input form. So do those of the
# types whose names begin with reg, which are ids in the catalog.
_TEXT_ONLY = frozenset(
    [
        "aclitem",
        "pg_node_tree",
        "pg_ndistinct",
        "pg_dependencies",
        "pg_mcv_list",
        "pg_brin_bloom_summary",
        "pg_brin_minmax_multi_summary",
        "gtsvector",
        "refcursor",
    ]
)
# Their binary input refuses a value that the type has: the empty one.
_TEXT_FORM = frozenset(["tsquery", "oidvector", "int2vector"])
# Their infinities are other values to the binary input of an older server.
_INFINITE_SINCE = {"numeric": 140000, "interval": 170000}
_NUMERIC_OF_ANY_SCALE = 150000
_CHAR_IN_ESCAPES = 150000  # a "char" beyond ASCII is \377 in text; an older server takes the \
FIRST_UNSTABLE_OID = 10000  # below it, PostgreSQL assigns type ids by hand: the same everywhere


class Kind(NamedTuple):
    """A type as the source's catalog has it, taken apart: a domain to its base, an array too."""

    base: str  # the source's words for it
    is_array: bool
    oid: int  # of the element, from here on
    name: str
    typtype: str  # pg_type.typtype
    nested_array: bool  # the element is an array itself, such as int2vector
    typmod: int
    extension: str | None

    @property
    def text(self) -> str:
        """What raw gets instead of it."""
        return "text[]" if self.is_array else "text"

    @property
    def kept(self) -> bool:
        """Whether raw may have the type itself, if the destination knows it."""
        built_in = self.oid < FIRST_UNSTABLE_OID
        return (
            (built_in or self.extension is not None)
            and self.typtype in ("b", "r", "m")
            and self.name not in _TEXT_ONLY
            and not (built_in and self.name.startswith("reg"))
            and not (self.nested_array and self.is_array)
        )


# An extension's type is found by its name: its schema and its id are others in every database.
_KNOWN = """
select w.n, format_type(t.oid, w.typmod)
from unnest(%s::bigint[], %s::text[], %s::text[], %s::int[])
    with ordinality as w (oid, name, extension, typmod, n)
join pg_type t on case when w.extension is null then t.oid = w.oid else t.typname = w.name end
where w.extension is null or exists (
    select from pg_depend d join pg_extension e on e.oid = d.refobjid
    where d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
        and d.refclassid = 'pg_extension'::regclass and e.extname = w.extension)
"""


def known(destination: Connection | None, kinds: Sequence[Kind], source: int) -> dict[Kind, str]:
    """Return the destination's words for those that it has. ``source`` is that server's version."""
    kept = [kind for kind in kinds if kind.kept]
    if destination is not None and any(kind.name == "xml" for kind in kept):
        try:
            destination.execute("select ''::xml")
        except psycopg.errors.FeatureNotSupported:  # a server built without libxml
            kept = [kind for kind in kept if kind.name != "xml"]
    older = destination is not None and destination.info.server_version // 10000 < source // 10000
    asked = [kind for kind in kept if older or kind.extension]
    found = {kind: kind.base for kind in kept if kind not in asked}
    if destination is None or not asked:
        return found
    values = ([getattr(k, part) for k in asked] for part in ("oid", "name", "extension", "typmod"))
    for number, words in destination.execute(_KNOWN, list(values)):
        kind = asked[number - 1]
        found[kind] = words + ("[]" if kind.is_array else "") if kind.extension else kind.base
    return found


def decide(kind: Kind, words: str | None, source: int, destination: int) -> tuple[str, bool]:
    """Return raw's type, and whether its binary form means the same on both servers.

    ``words`` are the destination's for the type, None where it lacks it; ``source`` and
    ``destination`` are the servers' versions.
    """
    if words is None or (kind.name == "char" and destination < _CHAR_IN_ESCAPES <= source):
        return kind.text, True
    if kind.name == "numeric" and destination < _NUMERIC_OF_ANY_SCALE:
        words = re.sub(r"\((\d+),(-?\d+)\)", _scale_of_old, words)
    since = _INFINITE_SINCE.get(kind.name, 0)
    same = (source < since) == (destination < since)
    return words, same and kind.extension is None and kind.name not in _TEXT_FORM


def is_streamed(kind: Kind, type_id: int, raw_type: str) -> bool:
    """Return whether what a slot sends of a type in binary is what raw's type takes.

    There no cast comes before, as one does where rows are read. ``type_id`` is the column's own
    type: a domain's, say. An array names the type of its elements, which the destination may lack;
    an enum is sent as its label.
    """
    if kind.is_array and type_id >= FIRST_UNSTABLE_OID:
        return False
    return raw_type not in TEXTS or raw_type == kind.base or kind.typtype == "e"


def _scale_of_old(found: re.Match[str]) -> str:
    precision, scale = int(found[1]), int(found[2])
    return found[0] if 0 <= scale <= precision else ""
