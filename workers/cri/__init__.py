"""Runs in: cri.

The gRPC front for kubelets and the keeper of pods and containers: what exists, in which state, under
which name, and what was begun and must be finished. It asks storage, network, image, the supervisor and
the monitors to do things; itself it never forks, executes, mounts or opens a path that a user named.
Read `main.py` first: its two tables are this worker's whole API.
"""
