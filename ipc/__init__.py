"""Runs in: every process.

The house's own way to talk: typed messages over Unix SOCK_SEQPACKET sockets, descriptors beside them.
`wire`, `calls` and `messages` do no I/O; `aio`, `loop`, `serve` and `blocking` are its faces.
"""
