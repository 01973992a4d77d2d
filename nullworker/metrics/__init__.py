"""What Prometheus and the log lines show of a worker."""
