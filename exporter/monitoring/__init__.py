"""What is told of loads: how definitions stand, what a load would lack, how a run ended.

Definitions and results of loads come in; findings, figures and messages go out. Nothing is landed.
"""
