"""Runs in: the command lines `bulkhead` (which becomes the supervisor) and `bulkheadctl` (a client)."""
