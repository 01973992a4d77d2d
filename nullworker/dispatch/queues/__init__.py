"""How many jobs wait in the user's queue and how many are in flight: one adapter for each kind of queue."""
