"""The embedded server, and the demo that runs on it.

Its callers hand in the project's folder; URLs of databases to throw away go out.
"""
