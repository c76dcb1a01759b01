"""A row function that changes five fields: the Python model's, and pandas' own."""


def transform(row):
    referer = row["referer"] or ""
    row["host"] = referer.split("/")[2] if "//" in referer else None
    row["tag"] = row["tag"].lower() if row["tag"] else None
    row["is_bot"] = bool(row["is_bot"]) and not row["is_human"]
    row["status"] = row["status"] or "PENDING"
    row["source"] = "widget" if "widget" in referer else row["source"]
    return row
