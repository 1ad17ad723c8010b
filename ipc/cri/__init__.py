"""Runs in: cri, and in clients of the CRI socket (bulkheadctl, tests).

The Container Runtime Interface, v1: `api.proto` and the Python modules made of it by `generate.py`.
Owns the wire format between a kubelet and `cri`; refuses nothing, it has no behaviour.
Import `api_pb2` for messages, `api_pb2_grpc` for servicers, `rpc` for typed clients.
"""
