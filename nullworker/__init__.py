"""A Vast.ai Serverless worker that forwards nothing: it holds a reservation until the consumer releases it."""

__version__ = "0.1.0"
