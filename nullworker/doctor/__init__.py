"""`nullworker doctor`: examines this machine, its network and an endpoint, and says what to change."""
