"""One load as a sequence, several side by side, and what a load would do.

Definitions come in; rows land in raw, positions are stored, and a ``Result`` a definition goes out.
"""
