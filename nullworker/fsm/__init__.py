"""The state machine of a reservation, pure: the table of transitions, the events, and the book of what is live."""
