"""Runs in: the build of packages, and tests.

Texts that are written from the code itself: completions of three shells and the lists of commands in the
manual pages from the command lines, bulkhead.toml and the reference of its keys from the schema.
"""
