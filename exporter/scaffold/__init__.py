"""Files written for the dbt project: a table's definition and staging model, and its lineage.

The source's catalog and a person's answers come in; YAML and SQL, or entries of dbt's manifest, go
out.
"""
