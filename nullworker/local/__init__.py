"""`dev` and `demo`: Vast Serverless on this machine, with real workers and a fake autoscaler."""
