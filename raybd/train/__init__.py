"""The training loop, its schedule, and the context that tells it where it runs."""
