"""``history_as_scd2``: from the versions of rows to the times for which they held."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace
from tests.helpers.changes import results
from tests.helpers.history import declared, versions

MODEL = "{{ history_as_scd2(source('analytics_raw', 'Thing'), key=['Id']) }}"
INCREMENTAL = (
    "{{ config(materialized='incremental', incremental_strategy='upsert',"
    " unique_key=['Id', '_lsn', '_seq']) }}\n"
)
STEPS = (
    # several of one transaction, a row that goes and comes, a key that changes
    """
    begin; update "Thing" set a = 'b' where "Id" = 1;
    update "Thing" set a = 'c' where "Id" = 1; commit;
    delete from "Thing" where "Id" = 2; insert into "Thing" values (9, 'x')
    """,
    """
    insert into "Thing" values (2, 'again'); update "Thing" set "Id" = 33 where "Id" = 3;
    begin; insert into "Thing" values (10); delete from "Thing" where "Id" = 10; commit
    """,
    """update "Thing" set a = 'd' where "Id" = 1; delete from "Thing" where "Id" = 9""",
    "select",
)


@pytest.mark.long
def test_a_view_and_an_incremental_model(bare: Workplace) -> None:
    bare.query(
        bare.core,
        'create table "Thing" ("Id" int primary key, a text);'
        "insert into \"Thing\" values (1, 'a'), (2, 'a'), (3, 'a')",
    )
    bare.define(declared("Thing", "mode: history"))
    for name, text in {"seen": MODEL, "kept": INCREMENTAL + MODEL}.items():
        (bare.folder / "models" / f"{name}.sql").write_text(text)
    results(bare)
    for step in STEPS:
        bare.dbt("run", "--quiet")
        _same(bare)
        bare.query(bare.core, step)
        results(bare)
    bare.dbt("run", "--quiet")
    _same(bare)
    held = bare.query(
        bare.analytics,
        'select "Id", a, is_current, valid_from = min(_committed_at) over (), valid_to > valid_from'
        ' from kept order by "Id", _lsn, _seq',
    )
    assert held == [
        (1, "a", False, True, True),
        (1, "c", False, False, True),
        (1, "d", True, False, None),
        (2, "a", False, True, True),
        (2, "again", True, False, None),
        (3, "a", False, True, True),
        (9, "x", False, False, True),
        (33, "a", True, False, None),
    ]
    gap = bare.query(
        bare.analytics,
        'select min(valid_to) < max(valid_from) from kept where "Id" = 2',
    )
    assert gap == [(True,)]
    joined = bare.query(  # where one ends, the next one begins
        bare.analytics,
        'select count(*) from kept o join kept n on n."Id" = o."Id" and n.valid_from = o.valid_to'
        ' where o."Id" = 1',
    )
    assert joined == [(2,)]
    assert len(versions(bare, '"Thing"', '"Id" = 10')) == 2


def _same(place: Workplace) -> None:
    """Assert that the increments came to what the view shows."""
    both = [
        place.query(place.analytics, f'select r.*::text from {name} r order by "Id", _lsn, _seq')
        for name in ("seen", "kept")
    ]
    assert both[0] == both[1]
    assert both[0]
