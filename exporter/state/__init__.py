"""What is remembered at the destination: positions, locks, runs, and who may land a range.

Plain values go in and come out. Nothing here knows a source.
"""
