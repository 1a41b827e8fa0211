"""Experiments: each file is one, and its command is `python -m experiments.NAME`."""

import gc

# Imports and tracing make objects by the hundred thousand, most of which stay. By default the
# collector looks at them so often that it takes a tenth of the time to the first step.
gc.set_threshold(20_000)
