"""Where an event's visitor came from: a row function for what is awkward in SQL."""

from urllib.parse import parse_qs, urlsplit


def visit(row):
    """Return one event's visit; None, and so no row, if nothing is known of its visitor."""
    attributes = row["custom_attributes"] or {}
    try:
        address = urlsplit(row["referer"] or "")
    except ValueError:  # such as `http://[`: browsers send what they like
        address = urlsplit("")
    if not attributes and not address.hostname:
        return None
    query = parse_qs(address.query)
    return {
        "old_id": row["old_id"],
        "referer_host": address.hostname,
        "referer_path": address.path or None,
        "utm_source": query.get("utm_source", [None])[0],
        "utm_campaign": query.get("utm_campaign", [None])[0],
        "device": attributes.get("device"),
        "campaign": attributes.get("campaign"),
        "_exported_at": row["_exported_at"],
    }


def model(dbt, session):
    dbt.config(materialized="incremental", incremental_strategy="upsert", unique_key="old_id")
    return dbt.new_rows(dbt.ref("stg_stat_event")).map(visit)
