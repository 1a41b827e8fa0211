"""A run on disk: its folder, lock, checkpoints, metrics, environment, and the trained model."""
