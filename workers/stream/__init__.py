"""Runs in: stream.

Exec, attach and port-forward for kubelets, over HTTP: SPDY/3.1 and WebSocket. It parses what clients send and
therefore has no privilege and no state. Which session a token stands for, and the descriptors of the
container's side, come from cri; from then on bytes flow between the two through this process alone.
"""
