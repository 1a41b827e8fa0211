"""Jobs: the classes of experiments, which put the parts of a run together."""
