"""Prometheus metrics, and a log line for each committed event."""
