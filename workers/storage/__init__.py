"""Runs in: storage and its short-lived children (`unpack` and the jobs of ipc and workers.jobs).

Layers, images, the root file systems of containers, and the few things on the host's file system that
`cri` must not touch itself. Owns everything under the root directory and `<run_root>/{containers,pods}`.
Refuses: to parse a registry's answers (image does), to follow a link out of an image, and to hold two
truths: what is on disk under a layer's, a container's or a pod's name is what there is.
"""
