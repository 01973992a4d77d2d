"""`nullworker collect`: the events of a whole fleet in one SQLite file, which outlives the machines they come from."""
