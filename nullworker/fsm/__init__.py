"""The state machine of a reservation: transition table, typed events, and the book of live reservations. Pure."""
