"""All that Vast sees or signs: its messages, its signature and key, the calls to it, and when they are made."""
