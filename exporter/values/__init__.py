"""Rows of Python on their way to a table: their columns, the types of these, and COPY's text.

For dbt's Python models and for functions that yield rows. Imports no driver and no library of
frames; whoever has such a row has imported them already.
"""
