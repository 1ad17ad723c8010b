"""Runs in: cri, where NRI is enabled. The way from pods and containers to the nri worker, and back.

Loaded only then. It speaks in the OCI runtime-spec; the interface's own protobuf is nri's business.
"""
