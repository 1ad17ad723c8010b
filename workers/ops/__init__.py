"""Runs in: ops.

What operators and their scrapers ask: /metrics, /workers, /info, /healthz, over HTTP on a Unix socket that
the supervisor binds. It starts with the first connection and leaves when nobody asks. It owns no state: all
it tells it asks of the supervisor and of cri, and reads of /proc what everybody may read. It changes nothing.
"""
