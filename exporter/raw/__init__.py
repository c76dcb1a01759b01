"""The destination: the raw table, its changes, and the ways in which rows land in it.

Columns of the source and batches of rows come in; statements for the destination go out.
"""

from exporter.raw.table import DELETED, STAMP, RawTable

__all__ = ["DELETED", "STAMP", "RawTable"]
