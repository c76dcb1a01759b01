"""The same function's rows by dlt: merge on the key, an object as one column."""

import os
import sys

import dlt
import sqlalchemy as sa

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "rows"))

from readers.orders import orders


def _url(variable: str) -> str:
    """Return the URL with the parts that dlt insists on; a socket in its query still wins."""
    url = sa.make_url(os.environ[variable])
    url = url.set(password=url.password or "none", host=url.host or "localhost")
    return url.render_as_string(hide_password=False)


def main() -> None:
    pipeline = dlt.pipeline(
        "bench_rows",
        pipelines_dir=os.environ["DLT_DATA_DIR"],
        destination=dlt.destinations.postgres(_url("DATABASE_URL_ANALYTICS")),
        dataset_name="bench_dlt_rows",
    )
    resource = dlt.resource(
        orders,
        primary_key="id",
        write_disposition="merge",
        columns={"address": {"data_type": "json"}},
    )
    pipeline.run(resource(None)).raise_on_failed_jobs()


if __name__ == "__main__":
    main()
