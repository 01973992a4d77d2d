"""The event log: a SQLite file with every event of every reservation, appended to before its effect is seen."""
