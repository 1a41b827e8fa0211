"""Experiments: each file is one, and its command is `python -m experiments.NAME`."""
