"""Runs in: `bulkhead check`, `bulkhead wipe`, `bulkheadctl check`.

The state of a node, looked at and mended.
"""
