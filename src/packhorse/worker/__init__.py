"""The worker: what `run` and `exec` do around a child process."""
