"""dbt's own tests of incremental models, with ``upsert`` as strategy, and of Python models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import psycopg
import pytest
from dbt.artifacts.schemas.results import RunStatus
from dbt.tests.adapter.basic.test_incremental import BaseIncremental
from dbt.tests.adapter.constraints.test_constraints import (
    BaseIncrementalConstraintsColumnsEqual,
    BaseIncrementalConstraintsRollback,
    BaseIncrementalContractSqlHeader,
)
from dbt.tests.adapter.grants.base_grants import TEST_USER_ENV_VARS
from dbt.tests.adapter.grants.test_incremental_grants import BaseIncrementalGrants
from dbt.tests.adapter.incremental.test_incremental_merge_exclude_columns import (
    BaseMergeExcludeColumns,
    models__merge_exclude_columns_sql,
)
from dbt.tests.adapter.incremental.test_incremental_on_schema_change import (
    BaseIncrementalOnSchemaChange,
)
from dbt.tests.adapter.incremental.test_incremental_predicates import BaseIncrementalPredicates
from dbt.tests.adapter.incremental.test_incremental_unique_id import (
    BaseIncrementalUniqueKey,
    seeds__add_new_rows_sql,
    seeds__duplicate_insert_sql,
    seeds__seed_csv,
)
from dbt.tests.adapter.python_model.test_python_model import (
    BasePythonEmptyTests,
    BasePythonIncrementalTests,
    BasePythonMetaGetTests,
    BasePythonModelTests,
    BasePythonSampleTests,
    incremental_python,
    m_1,
    python_model_meta_from_schema,
    python_model_meta_get,
    schema_yml_with_meta,
)
from dbt.tests.util import run_dbt
from dbt.version import __version__

from exporter.scaffold import adoption
from tests.conftest import _database

pytest_plugins = ["dbt.tests.fixtures.project"]
pytestmark = pytest.mark.filterwarnings("ignore")  # dbt's own, now in the tests' process


class Upsert:
    """A project that has what `exporter init` adds, and whose incremental models say ``upsert``."""

    @pytest.fixture(scope="class")
    def dbt_profile_target(self, servers: tuple[str, str]) -> Iterator[dict[str, object]]:
        url, name = urlsplit(servers[1]), "dbt_adapter_tests"
        with psycopg.connect(servers[1], autocommit=True) as connection:
            connection.execute(f"create database {name}")
        with psycopg.connect(_database(servers[1], name)) as connection:
            yield {
                "type": "postgres",
                "threads": 4,
                "host": connection.info.host,
                "port": connection.info.port,
                "user": connection.info.user,
                "pass": unquote(url.password or "none"),
                "dbname": name,
            }
        with psycopg.connect(servers[1], autocommit=True) as connection:
            connection.execute(f"drop database {name} with (force)")

    @pytest.fixture(scope="class")
    def macros(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        root = tmp_path_factory.mktemp("project")
        changes = adoption.changes(root, {"name": "test", "profile": "test"}, profile=False)
        return {
            change.file.name: change.after or ""
            for change in changes
            if change.file.parent.name == adoption.FOLDER
        }

    @pytest.fixture(scope="class")
    def project_config_update(self) -> dict[str, object]:
        return {"models": {"+incremental_strategy": "upsert", "test": self.settings}}

    settings: ClassVar[dict[str, object]] = {}


class TestIncremental(Upsert, BaseIncremental):
    settings: ClassVar[dict[str, object]] = {"+unique_key": "id"}


@pytest.mark.long
class TestUniqueKey(Upsert, BaseIncrementalUniqueKey):
    # without a key there is nothing to upsert on: `upsert` refuses, `append` says so
    settings: ClassVar[dict[str, object]] = {
        "+meta": {"upsert_order_by": "last_visit_date"},
        **{
            name: {"+incremental_strategy": "append"}
            for name in ("no_unique_key", "empty_unique_key_list", "empty_str_unique_key")
        },
    }

    @pytest.fixture(scope="class")
    def seeds(self) -> dict[str, str]:
        """dbt's, without what a key forbids: a state that comes twice, and a city that is null."""
        text = seeds__seed_csv.replace("NY,New York", "NH,New York").replace("r,,", "r,Denver,")
        return {
            "duplicate_insert.sql": seeds__duplicate_insert_sql,
            "seed.csv": text,
            "add_new_rows.sql": seeds__add_new_rows_sql,
        }

    @pytest.fixture(scope="class")
    def models(self) -> dict[str, object]:
        models: dict[str, Any] = inspect.unwrap(BaseIncrementalUniqueKey.models)(self)
        models["expected"] = {
            name: text.replace("'NY','New York'", "'NH','New York'").replace("null", "'Denver'")
            for name, text in models["expected"].items()
        }
        return models

    def fail_to_build_inc_missing_unique_key_column(
        self, incremental_model_name: str
    ) -> tuple[RunStatus, str]:
        """Our first build refuses already what dbt's lets pass."""
        run_dbt(["seed", "--select", "seed", "--full-refresh"])
        run = run_dbt(["run", "--select", incremental_model_name], expect_pass=False)
        return run.results[0].status, run.results[0].message


@pytest.mark.long
class TestMergeExcludeColumns(Upsert, BaseMergeExcludeColumns):
    @pytest.fixture(scope="class")
    def models(self) -> dict[str, str]:
        text = models__merge_exclude_columns_sql.replace("'merge'", "'upsert'")
        assert "'upsert'" in text
        return {"merge_exclude_columns.sql": text}


@pytest.mark.long
class TestPredicates(Upsert, BaseIncrementalPredicates):
    settings: ClassVar[dict[str, object]] = {
        "+incremental_predicates": ["dbt_internal_dest.id != 2"]
    }

    @pytest.fixture(scope="class")
    def seeds(self) -> dict[str, str]:
        """The predicate holds row 2 back: a unique key has no room for the second one."""
        rows = "id,msg,color\n1,hey,blue\n2,goodbye,red\n3,anyway,purple\n"
        return {"expected_delete_insert_incremental_predicates.csv": rows}

    def get_expected_fields(self, relation, seed_rows, opt_model_count=None):  # type: ignore[no-untyped-def]
        return super().get_expected_fields(relation, seed_rows - 1, opt_model_count)


@pytest.mark.long
class TestOnSchemaChange(Upsert, BaseIncrementalOnSchemaChange):
    pass


@pytest.mark.long
class TestConstraintsColumnsEqual(Upsert, BaseIncrementalConstraintsColumnsEqual):
    settings: ClassVar[dict[str, object]] = {"+unique_key": "id"}


@pytest.mark.long
class TestConstraintsRollback(Upsert, BaseIncrementalConstraintsRollback):
    settings: ClassVar[dict[str, object]] = {"+unique_key": "date_day"}


@pytest.mark.long
class TestContractSqlHeader(Upsert, BaseIncrementalContractSqlHeader):
    settings: ClassVar[dict[str, object]] = {"+unique_key": "column_name"}


@pytest.mark.long
class TestGrants(Upsert, BaseIncrementalGrants):
    settings: ClassVar[dict[str, object]] = {"+unique_key": "fun"}

    @pytest.fixture(scope="class", autouse=True)
    def get_test_users(self, servers: tuple[str, str]) -> Iterator[list[str]]:
        roles = [f"dbt_exporter_test_{number}" for number in (1, 2, 3)]
        with psycopg.connect(servers[1], autocommit=True) as connection:
            for role in roles:
                connection.execute(f"create role {role}")
        with pytest.MonkeyPatch.context() as environment:
            for name, role in zip(TEST_USER_ENV_VARS, roles, strict=True):
                environment.setenv(name, role)
            yield roles
        with psycopg.connect(servers[1], autocommit=True) as connection:
            for role in roles:
                connection.execute(f"drop role {role}")


class TestPythonModel(Upsert, BasePythonModelTests):
    pass


@pytest.mark.long
class TestPythonIncremental(Upsert, BasePythonIncrementalTests):
    @pytest.fixture(scope="class")
    def models(self) -> dict[str, str]:
        """A relation of PostgreSQL is narrowed by SQL, not by a frame's column."""
        model = incremental_python.replace("df.filter(df.id > 5)", "df.where('id > 5')")
        assert "where" in model
        return {"m_1.sql": m_1, "incremental.py": model}


@pytest.mark.long
class TestPythonIncrementalMerge(TestPythonIncremental):
    @pytest.fixture(scope="class")
    def project_config_update(self) -> dict[str, object]:
        return {"models": {"+incremental_strategy": "merge"}}


@pytest.mark.skipif(__version__ < "1.11", reason="dbt has meta_get since 1.11")
class TestPythonMetaGet(Upsert, BasePythonMetaGetTests):
    @pytest.fixture(scope="class")
    def models(self) -> dict[str, str]:
        """Rows are dicts here: there is no Spark session that would make a frame of tuples."""

        def with_dicts(text: str) -> str:
            call = re.search(r"session.createDataFrame\(data, (.+)\)", text)
            assert call is not None
            return text.replace(call[0], f"[dict(zip({call[1]}, row)) for row in data]")

        return {
            "meta_test.py": with_dicts(python_model_meta_get),
            "meta_from_schema.py": with_dicts(python_model_meta_from_schema),
            "schema.yml": schema_yml_with_meta,
        }


@pytest.mark.long
class TestPythonEmpty(Upsert, BasePythonEmptyTests):
    pass


@pytest.mark.long
class TestPythonSample(Upsert, BasePythonSampleTests):
    pass
