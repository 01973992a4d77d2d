"""Those who watch committed events: the exporter for Prometheus, the reporter to the autoscaler."""
