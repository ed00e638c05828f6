"""A race: many writers, one thread each, told at one moment to write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from ..errors import KeyConflictError, StoreError, StoreUnavailableError

_START_S_MAX: Final = 60.0


def race(write: Callable[[bytes], object], bodies: list[bytes]) -> tuple[list[bytes], int]:
    """Let one thread per body write at the same moment.

    Returns:
        The bodies of those that were told they won, and how many got no answer.

    Raises:
        StoreError: a writer met neither victory nor defeat nor a lost reply.
    """
    barrier = threading.Barrier(len(bodies))
    lock = threading.Lock()  # guards the lists
    won: list[bytes] = []
    unknown: list[bytes] = []
    failed: list[StoreError] = []

    def run(body: bytes) -> None:
        barrier.wait(_START_S_MAX)
        try:
            write(body)
        except KeyConflictError:
            return
        except StoreUnavailableError:
            with lock:
                unknown.append(body)
        except StoreError as error:
            with lock:
                failed.append(error)
        else:
            with lock:
                won.append(body)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return won, len(unknown)
