"""What JAX compiles while a test runs."""

import contextlib

import jax


@contextlib.contextmanager
def compilations(of=("",)):
    """A list that gets the name of every function compiled in the block whose name contains one of `of`."""
    names = []

    def listener(event, *_, fun_name="", **__):
        if "backend_compile" in event and any(part in fun_name for part in of):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
