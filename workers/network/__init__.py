"""Runs in: network.

Pod network: namespaces pinned in the file system, CNI plugins, the records of both. It owns
`<run_root>/ns/` (but for `pid` pins, the supervisor's) and `<run_root>/net/`. It runs no container, keeps no
pod state beyond what undoes its own work, and refuses to begin a pod whose earlier attempt it cannot undo.
"""
