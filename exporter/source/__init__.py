"""The source: its catalog, and one module for each way of reading, behind ``Reader``.

A definition's source and a stored position come in; a plan and batches of rows go out.
"""
