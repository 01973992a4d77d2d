"""The HTTP ports of a worker: handlers that parse a request, call the service and render the answer."""
