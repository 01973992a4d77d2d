"""Entry point for Vast's start script, which runs `python3 -m worker` in a clone of this repository."""

import sys

from nullworker.cli.commands import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
