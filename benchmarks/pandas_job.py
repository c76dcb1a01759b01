"""What a row function is without a framework: read_sql, apply, to_sql. Runs in `.bench`."""

import sys

import pandas
import sqlalchemy
from transform import transform

engine = sqlalchemy.create_engine(sys.argv[1].replace("postgresql:", "postgresql+psycopg2:", 1))
frame = pandas.read_sql("select * from events", engine)
frame = frame.astype(object).where(frame.notna(), None).apply(transform, axis=1)
kinds = {"custom_attributes": sqlalchemy.JSON, "tags": sqlalchemy.ARRAY(sqlalchemy.Text)}
frame.to_sql("pandas", engine, index=False, if_exists="replace", dtype=kinds, chunksize=10_000)
