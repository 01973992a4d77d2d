"""The event log: a SQLite file with every event of every reservation, committed before its effect is visible."""
