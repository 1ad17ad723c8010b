"""Runs in: nri, and in the tests' plugins.

The wire format of the node resource interface: `nri.proto`, `ttrpc.proto` below it, and the Python modules
made of them by `generate.py`. It has no behaviour and refuses nothing. No other process loads it.
"""
