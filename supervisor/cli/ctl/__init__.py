"""Runs in: bulkheadctl, a client process of its own.

The testing client of the CRI socket and the operator's window on the workers, one module per subject.
It owns nothing on the host; whatever it shows it asked for over a socket, but memory and CPU of processes,
which it reads from /proc.
"""
