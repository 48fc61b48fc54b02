"""
The bench: each row of docs/performance.rst measured beside its peer or floor, in one run. Started
by bin/bench.
"""
