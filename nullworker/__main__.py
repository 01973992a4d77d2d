"""`python -m nullworker`."""

from nullworker.cli.commands import main

if __name__ == "__main__":
    main()
