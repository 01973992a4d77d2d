"""`python -m nullworker`."""

from nullworker.cli import main

if __name__ == "__main__":
    main()
