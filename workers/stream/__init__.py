"""Runs in: stream.

Exec, attach and port-forward for kubelets, over HTTP; the process that will parse what clients send, and
therefore has no privilege and no state. What it serves now is the number of its sessions: its protocols are
not there yet, and cri answers the RPCs that would lead here with UNIMPLEMENTED.
"""
