"""`nullworker dispatch`: keeps as many workers reserved as a queue needs."""
