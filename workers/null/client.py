"""The door for `python -m workers.null.client --endpoint NAME --duration S`; all of it is in nullworker/client.py."""

from nullworker.client import reserve

if __name__ == "__main__":
    reserve(prog_name="python -m workers.null.client")
