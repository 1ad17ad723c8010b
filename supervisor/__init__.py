"""Runs in: the supervisor (and its command lines).

The one privileged process: it binds sockets, forks, watches, restarts, and parses nothing from a network.
It is single-threaded for ever and imports no grpc, asyncio, ssl or HTTP library. `table.py` is the map.
"""
