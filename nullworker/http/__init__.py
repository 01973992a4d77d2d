"""aiohttp in, JSON out: one app for each port, made by a function that takes what it needs.

wire.py has what all share, bodies.py what comes in, grants.py who may ask; external.py and sessions.py the signed port,
control.py and stream.py the local one; server.py the connections. An adapter parses, calls the service, renders; it
decides nothing about reservations.
"""
