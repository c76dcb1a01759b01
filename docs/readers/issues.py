"""Issues of a tracker: a web service that gives them page by page, and wants a token."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry


def issues(since: datetime | None) -> Iterator[dict[str, Any]]:
    """Yield the issues that were changed at this time or later, in the order of the changes."""
    # Five more tries, after 1, 2, 4 … seconds, or as the service's Retry-After says.
    retry = Retry(5, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504])
    address = os.environ["TRACKER_URL"] + "/issues"
    asked = {"per_page": "100", "changed_since": since.isoformat() if since else ""}
    with requests.Session() as session:
        session.mount(address, HTTPAdapter(max_retries=retry))
        session.headers["Authorization"] = f"Bearer {os.environ['TRACKER_TOKEN']}"
        while address:
            answer = session.get(address, params=asked, timeout=30)
            answer.raise_for_status()
            for issue in answer.json():
                author = issue.pop("author")
                yield issue | {"author_id": author["id"], "author": author["login"]}
            address = answer.links.get("next", {}).get("url")
            asked = {}  # the address of the next page has them
