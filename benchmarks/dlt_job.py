"""StatEvent by dlt: pyarrow backend, merge on the primary key, cursor updated_at."""

import os

import dlt
import sqlalchemy as sa
from dlt.sources.sql_database import sql_table


def _enums_as_text(column: sa.types.TypeEngine) -> sa.types.TypeEngine:
    return sa.Text() if isinstance(column, sa.Enum) else column


def _url(variable: str) -> str:
    """Return the URL with the parts that dlt insists on; a socket in its query still wins."""
    url = sa.make_url(os.environ[variable])
    url = url.set(password=url.password or "none", host=url.host or "localhost")
    return url.render_as_string(hide_password=False)


def main() -> None:
    table = sql_table(
        credentials=_url("DATABASE_URL_CORE").replace("postgresql:", "postgresql+psycopg2:", 1),
        schema="public",
        table="StatEvent",
        backend="pyarrow",
        chunk_size=50_000,
        incremental=dlt.sources.incremental("updated_at"),
        type_adapter_callback=_enums_as_text,
        reflection_level="full_with_precision",
    )
    table.apply_hints(primary_key="id", write_disposition="merge")
    pipeline = dlt.pipeline(
        "bench",
        pipelines_dir=os.environ["DLT_DATA_DIR"],
        destination=dlt.destinations.postgres(_url("DATABASE_URL_ANALYTICS")),
        dataset_name="bench_dlt",
    )
    pipeline.run(table).raise_on_failed_jobs()


if __name__ == "__main__":
    main()
