"""Files for the dbt project: a table's definition and staging model, and its lineage in dbt docs.

The catalog of the source and a person's answers come in; YAML and SQL files, and entries of dbt's
manifest and catalog, go out.
"""
