"""One load as a sequence, several side by side, and what a load would do.

Definitions come in; rows land in raw, positions are stored, and a ``Result`` a definition goes out.
"""

MOST_DELETES = 10  # percent of raw that may go in one load, unless the command line says otherwise
