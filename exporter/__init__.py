"""PostgreSQL to PostgreSQL, incrementally: lands raw rows for dbt."""
