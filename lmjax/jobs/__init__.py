"""What an experiment can be: the classes that put the parts together and tell the run's story."""
