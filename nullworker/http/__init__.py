"""The ports of a worker: adapters that parse, call the service, and render what came of it."""
