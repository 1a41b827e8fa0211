"""Experiments: each file is one, and its command is `python -m experiments.NAME`."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is still looking for the module that it will run
    from lmjax.config.memory import keep_memory

    keep_memory()  # before the experiment and jax are imported, which would be for nothing
