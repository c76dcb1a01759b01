"""Source against raw, row by row, and the repair of what differs.

A definition comes in; a verdict goes out, and with a repair, the rows that a load lands.
"""
