"""Runs in: every worker, between fork and its first job (declared by the supervisor's table).

The sandbox: one file per mechanism of the kernel, one function that applies them in the one right order.
It owns what a worker is locked out of; it refuses to start a worker that would be freer than declared.
"""
