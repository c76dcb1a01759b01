"""An embedded PostgreSQL server for the demo and the tests, and the demo itself.

The project's folder and the server's settings come in; URLs of throw-away databases go out. The
demo prints what it does.
"""
