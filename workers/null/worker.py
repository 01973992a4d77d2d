"""Entry point for Vast's start script with BACKEND=null: `python3 -m workers.null.worker`."""

import sys

from nullworker.cli.commands import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
