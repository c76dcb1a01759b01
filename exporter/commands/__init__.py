"""The command line: ``exporter`` and its commands, a module each, and what they share.

Words and options come in; a command calls the rooms below, prints what they return, and ends with
an exit status. ``shared.main`` imports the command that is called.
"""
