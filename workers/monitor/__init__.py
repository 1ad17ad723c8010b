"""Runs in: the monitor, one process per container, forked by the supervisor with all of this loaded.

It runs the OCI runtime, owns the container's stdio, writes its log and its exit record, stops it, and lives
exactly as long as it. It outlives every other process of the house and calls none of them. It imports
nothing after the fork, has no thread and applies no sandbox, which the container would inherit.
"""
