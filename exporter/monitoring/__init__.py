"""What people and other systems are told of loads.

Definitions and the results of loads come in. Out go the findings of ``exporter check``, the figures
of ``exporter status``, and messages to Slack, Sentry, a health check or a metrics file. No row is
landed here.
"""
