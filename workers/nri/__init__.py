"""Runs in: nri. The node resource interface: plugins that watch, adjust and update pods and containers.

Owns the connections to plugins and the order in which they are asked, and nothing else: what exists is
cri's to know. Its language with cri is the OCI runtime-spec; only here it becomes the interface's protobuf.
See docs/nri.md.
"""
