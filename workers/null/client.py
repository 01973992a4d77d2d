"""Entry point `python -m workers.null.client --endpoint NAME --duration S`: the same as `nullworker reserve`."""

import sys

from nullworker.cli.commands import main

if __name__ == "__main__":
    main(["reserve", *sys.argv[1:]])
