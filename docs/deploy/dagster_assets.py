"""Dagster: raw tables and dbt models as assets of one graph, loaded and built every night.

pip install dagster-webserver dagster-dbt dbt-exporter
PROJECT_DIR=/srv/analytics dagster dev -f dagster_assets.py
"""

import json
import os
from pathlib import Path

from dagster import (
    AssetKey,
    AssetSpec,
    Definitions,
    Failure,
    MaterializeResult,
    ScheduleDefinition,
    define_asset_job,
    multi_asset,
)
from dagster_dbt import DbtCliResource, DbtProject, dbt_assets

from exporter.api import load

ROOT = Path(os.environ.get("PROJECT_DIR", Path.cwd()))
project = DbtProject(project_dir=ROOT, profiles_dir=ROOT)
project.preparer.prepare(project)  # dbt parse


def raw_tables():
    """Yield the key and asset of each definition. Assets have dbt's names, so that graphs join."""
    manifest = json.loads(project.manifest_path.read_text())
    for source in manifest["sources"].values():
        definition = source["meta"].get("exporter")
        if definition is not None and "source" in definition:  # database alone is of a whole source
            key = definition.get("key", f"{source['source_name']}.{source['name']}")
            yield key, AssetKey([source["source_name"], source["name"]])


RAW = dict(raw_tables())


@multi_asset(specs=[AssetSpec(asset, skippable=True) for asset in RAW.values()], can_subset=True)
def raw(context):
    """Land what is new for the selected tables."""
    keys = [key for key, asset in RAW.items() if asset in context.selected_asset_keys]
    results = load(keys, project_dir=ROOT)
    for result in results:
        if result.error is None:
            yield MaterializeResult(asset_key=RAW[result.key], metadata=result.totals.as_dict())
    errors = [str(result.error) for result in results if result.error]
    if errors:
        raise Failure("\n".join(errors))


@dbt_assets(manifest=project.manifest_path)
def models(context, dbt: DbtCliResource):
    """Build the models and test them."""
    yield from dbt.cli(["build"], context=context).stream()


nightly = define_asset_job("nightly", [raw, models])
definitions = Definitions(
    assets=[raw, models],
    resources={"dbt": DbtCliResource(project_dir=project)},
    schedules=[ScheduleDefinition(job=nightly, cron_schedule="15 4 * * *")],
)
