"""The state machine: pure, no I/O, no clock, no asyncio, no randomness.

table.py has the rules as data, events.py the words of the log, book.py what is live and the decisions.
"""
