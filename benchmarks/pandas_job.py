"""What a row function is without a framework: read_sql, apply, to_sql. Runs in `.bench`."""

import sys

import pandas
import sqlalchemy


def transform(row):
    referer = row["referer"] or ""
    row["host"] = referer.split("/")[2] if "//" in referer else None
    row["tag"] = row["tag"].lower() if row["tag"] else None
    row["is_bot"] = bool(row["is_bot"]) and not row["is_human"]
    row["status"] = row["status"] or "PENDING"
    row["source"] = "widget" if "widget" in referer else row["source"]
    return row


engine = sqlalchemy.create_engine(sys.argv[1].replace("postgresql:", "postgresql+psycopg2:", 1))
frame = pandas.read_sql("select * from events", engine)
frame = frame.astype(object).where(frame.notna(), None).apply(transform, axis=1)
kinds = {"custom_attributes": sqlalchemy.JSON, "tags": sqlalchemy.ARRAY(sqlalchemy.Text)}
frame.to_sql("pandas", engine, index=False, if_exists="replace", dtype=kinds, chunksize=10_000)
