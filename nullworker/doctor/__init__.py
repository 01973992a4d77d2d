"""`doctor`: examines a machine, its network and an endpoint, and says what to change."""
