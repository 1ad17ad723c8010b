"""Runs in: cri. What containers and pods use: CRI's stats and CRI's metrics.

Everything is read without a privilege from what the kernel shows anybody: cgroup files, and of a process its
network counters, limits and number of descriptors. Only writable layers are storage's to measure (layers.py).
Nothing here forks, waits for a disk or walks a tree.
"""
