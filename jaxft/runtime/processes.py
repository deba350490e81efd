"""Many processes as one run: each runs the same command, and finds the others here.

Who they are, `join` reads from the environment:

    JAX_COORDINATOR_ADDRESS  host:port of the first process
    JAX_NUM_PROCESSES        how many there are
    JAX_PROCESS_ID           which of them this one is, from 0

What is not set, JAX finds out by itself under Slurm, Open MPI, Kubernetes and GKE, and on Cloud TPU machines. All
processes see the storage where the run's folder stands: a file system (NFS, Filestore, a mounted bucket), or gs://.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.errors import UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOST = (
    "a process of this run ended (its own output says why), and with it the others; the same "
    "command on all of them goes on from the last checkpoint"
)
# Words by which XLA tells that another process, or the way to it, is gone, and those that a bucket's client uses too.
SIGNS = ("gloo", "coordination service", "heartbeat", "another task")
UNSURE_SIGNS = ("connection", "unavailable", "aborted")


def expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment speaks of more processes than this one.

    >>> expected({"SLURM_STEP_NUM_TASKS": "4"}), expected({"JAX_NUM_PROCESSES": "1"}), expected({})
    (True, False, False)
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return environment.get("JAX_NUM_PROCESSES") != "1"
    counts = [
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    ]
    return any(count != "1" for count in counts) or "," in environment.get(
        "TPU_WORKER_HOSTNAMES", ""
    )


def join(always: bool = False) -> None:
    """Finds the run's other processes. Must come before the first use of a device.

    Args:
        always: ask JAX to find them even where the environment does not speak of any, as on Cloud TPU machines
            that are told about each other by their metadata server.

    Raises:
        UserError: a variable that is no number, or processes that do not answer.
    """
    if jax.distributed.is_initialized() or not (always or expected(os.environ)):
        return
    given: dict[str, Any] = {
        key: _number(name) for key, name in
        (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
    }  # fmt: skip
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if "cpu" in (platforms or ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **given)
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n")[0]
        raise UserError(
            f"the run's processes did not find each other: {line}; {', '.join(EXPLICIT)}"
        ) from error


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name} takes a number, not {text!r}")
    return int(text) if text else None


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def common(numbers: Sequence[int], most: int) -> set[int]:
    """Those of at most `most` numbers from 0 that every process has."""
    own = np.full(most, -1, np.int32)
    own[: len(numbers)] = numbers
    rows = multihost_utils.process_allgather(own) if jax.process_count() > 1 else own[None]
    return set[int].intersection(*(set(row.tolist()) for row in np.asarray(rows))) - {-1}


def as_first(number: int) -> int:
    """The number of 32 bits that the first process gives: all call this together."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def preempted(step: int) -> bool:
    """Whether a process was asked to stop (SIGTERM), and all have come to the step at which they stop together."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


def to_host(array: Any) -> np.ndarray:
    """An array as NumPy's, of whose parts this process may hold only some: all processes call this together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    return np.asarray(whole)


def several() -> bool:
    """Whether the run has other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def fate_shared() -> Iterator[None]:
    """Within it, the loss of another process is one line, and whatever else is raised ends this process at once.

    An ordinary end would wait for the others, and they for this one.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        if not several():
            raise
        if lost(error):
            print(f"jaxft: {LOST}", file=sys.stderr)
        else:
            traceback.print_exc()
        leave(1)


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone.

    >>> lost(RuntimeError("Gloo AllReduce failed: Connection closed by peer")), lost(RuntimeError("out of memory"))
    (True, False)
    """
    unsure = isinstance(error, RuntimeError) and _says(error, UNSURE_SIGNS)
    return unsure or surely_lost(error)


def surely_lost(error: BaseException) -> bool:
    """The same where a write failed, which may have waited for another process or for a bucket.

    >>> surely_lost(ValueError("UNKNOWN: Gloo AllGather failed")), surely_lost(RuntimeError("Connection closed"))
    (True, False)
    """
    return isinstance(error, RuntimeError | ValueError) and _says(error, SIGNS)


def _says(error: BaseException, signs: Sequence[str]) -> bool:
    return any(sign in str(error).lower() for sign in signs)


def leave(status: int) -> NoReturn:
    """Ends this process at once, whatever its threads do.

    Other processes, which may wait for this one for ever, then learn that it is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
