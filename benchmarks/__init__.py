"""`make bench`: the main job beside a raw pipe, `postgres_fdw` and dlt. See README.md here."""
