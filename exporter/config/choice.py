"""Which definitions the words of a command line name: keys, patterns, and dbt's tags."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from exporter.config.definition import Definition
from exporter.errors import UsageError, nearest

TAG = "tag:"


def choose(everything: list[Definition], words: Sequence[str]) -> list[Definition]:
    """Return the definitions that the words name, in the order of the words; all without words.

    A word is a key, a pattern of keys (``crm_*``) or ``tag:`` with a tag or a pattern of tags.
    Raises UsageError for a word that names none.
    """
    found: dict[str, Definition] = {}
    for word in words:
        found.update((one.key, one) for one in _named(everything, word))
    return list(found.values()) if words else everything


def one(everything: list[Definition], key: str) -> Definition:
    """Return the definition with this very key. Raises UsageError."""
    for definition in everything:
        if definition.key == key:
            return definition
    keys = [definition.key for definition in everything]
    raise UsageError(f"no definition has the key {key}", hint=nearest(key, keys))


def _named(everything: list[Definition], word: str) -> list[Definition]:
    exact = [it for it in everything if it.key == word]
    if exact:
        return exact
    if word.startswith(TAG):
        tag = word.removeprefix(TAG)
        tags = sorted({tag for it in everything for tag in it.tags})
        found = [it for it in everything if any(fnmatchcase(one, tag) for one in it.tags)]
        if not found:
            hint = nearest(tag, tags) if tags else "tags: [nightly] below the table's config"
            raise UsageError(f"no definition has the tag {tag}", hint=hint)
        return found
    if not set("*?[") & set(word):
        return [one(everything, word)]
    found = [it for it in everything if fnmatchcase(it.key, word)]
    if not found:
        hint = nearest(word, [it.key for it in everything])
        raise UsageError(f"no definition has a key like {word}", hint=hint)
    return found


def tags_of(source: Any, table: Any) -> list[Any]:
    """Return the tags that dbt gives a source table: its own and those of its source.

    dbt takes none of ``dbt_project.yml``.
    """
    found: list[Any] = []
    for declared in (source, table):
        found += declared.get("tags") or []
        tags = (declared.get("config") or {}).get("tags") or []
        found += tags if isinstance(tags, list) else [tags]
    return found
