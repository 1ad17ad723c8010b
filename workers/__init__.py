"""Runs in: the process that each package is named after.

One package per process, `boot` (the first code after the fork) and `jobs` (short-lived children).
"""
