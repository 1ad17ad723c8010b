"""Runs in: the supervisor, started as `python -m supervisor`; the same as the `bulkhead` command."""

import sys

from supervisor.cli.bulkhead import main

if __name__ == "__main__":
    sys.exit(main())
