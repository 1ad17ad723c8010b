"""Runs in: stream, bulkheadctl. Sans-IO.

The protocols that carry exec, attach and port-forward, both sides of each: SPDY/3.1, and channels in
WebSocket messages.
"""
