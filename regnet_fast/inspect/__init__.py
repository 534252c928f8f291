"""What runs and why, whether it is the same function, and how fast it is. Nothing here is needed to run a model."""
