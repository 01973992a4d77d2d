"""What this worker sends to Vast and what Vast signs: messages, signature, public key, connection, reporter."""
