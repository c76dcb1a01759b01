"""Which failures are tried again."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace
from tests.helpers.tables import ITEM


def test_a_limit_that_lasts_is_not_tried_again(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, pad text);"
        "insert into item select n, now() - n * interval '1 s', repeat(md5(n::text), 30)"
        " from generate_series(1, 20000) n;"
        f"alter database {place.core.rpartition('/')[2].partition('?')[0]}"
        " set temp_file_limit = '100kB'",
    )
    place.query(place.core, "create view v as select * from item order by pad")
    place.define(ITEM.replace("table: item", "table: v"))
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "temporary file size exceeds" in done.stderr
    assert "connecting again" not in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sec@ret@localhost/core",
        "postgresql://me:pass@word/core@localhost/core",
        "postgresql://me:1@2:3@localhost:5432/core",
    ],
)
def test_the_end_of_a_password_is_not_told(place: Workplace, url: str) -> None:
    place.define(ITEM)
    place.core = url
    for words in (["load"], ["check"], ["status"], ["verify"]):
        done = place.run("exporter", *words)
        said = " ".join((done.stdout + done.stderr).split())
        assert "DATABASE_URL_CORE: an @ of its password is not percent-encoded" in said
        for part in ("sec", "ret", "word", "2:3"):
            assert part not in said.replace("secret", "").replace("password", "")
