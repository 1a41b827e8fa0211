"""Counting what XLA compiles."""

import contextlib

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted_compilations():
    """Gives a list that grows by one for each program that is compiled, or read from a cache."""
    found = []

    def listen(event, seconds, **_):
        if event == EVENT:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
