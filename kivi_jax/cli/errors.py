"""How commands end where something is wrong: with one line."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax


@contextlib.contextmanager
def one_line_errors(first: Callable[[], None] | None = None) -> Iterator[None]:
    """Ends the program with one line on stderr where its input or the machine is at fault.

    `first` is called before JAX is used.
    """
    if first is not None:
        try:
            first()
        except (ValueError, RuntimeError) as error:
            fail(f"the other processes can't be joined: {error}")
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first, without a message, for want of a plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        fail(f"JAX can't start with JAX_PLATFORMS={platforms!r}: {str(error) or 'there is no such backend'}")
    try:
        yield
    except BrokenPipeError:  # whoever read along has had enough
        raise SystemExit(1) from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # JAX out of memory is a RuntimeError
        fail(str(error) or "out of memory")


def fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")  # at once, since other threads may write, too
    raise SystemExit(1)
