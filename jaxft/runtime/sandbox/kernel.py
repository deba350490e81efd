"""What the kernel forbids a process that runs somebody's Python: by seccomp, on Linux, for this process and for good.

An audit hook and limits of resources are kept by the interpreter, which the code is inside of; this is kept by the
kernel. Refused with "operation not permitted": new processes, other programs, sockets, signals, files opened to be
written, changes of folders, and the lifting of a limit. Threads are allowed. On other systems, or where the kernel
has no seccomp, nothing is done, and the hook and the limits stand alone.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

SET_NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER, SET_DEATH_SIGNAL = 38, 22, 2, 1
KILL = 9
ALLOW, REFUSE, ABSENT = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # | EPERM, | ENOSYS
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets into what the kernel shows to the filter
THREAD = 0x10000  # of clone's flags
WRITES = 0o1 | 0o2 | 0o100 | 0o1000  # of open's: for writing, for both, create, truncate
FOREIGN = 0x40000000  # x86's calls of another kind begin here


class Machine(NamedTuple):
    """The numbers of a machine's system calls.

    Attributes:
        architecture: as the kernel names it to a filter.
        refused: those refused whatever their arguments.
        clone: allowed for threads.
        opens: (number, which argument has the flags), allowed for reading.
        clone3: said to be absent, so that the C library uses `clone`, whose flags a filter can see.
    """

    architecture: int
    refused: tuple[int, ...]
    clone: int
    opens: tuple[tuple[int, int], ...]
    clone3: int = 435


# In both: fork, execve, socket, socketpair, kill, tkill, tgkill, ptrace, process_vm_writev, pidfd_open,
# pidfd_send_signal, unlink, rename, mkdir, link, symlink, mknod, truncate, chmod, chown, mount, unshare, setns,
# setrlimit, prlimit64, shmget, semget, msgget, memfd_create, bpf, io_uring_setup, openat2, and their relatives.
MACHINES = {
    "x86_64": Machine(
        0xC000003E,
        (
            57, 58, 59, 322, 41, 53, 62, 200, 234, 101, 311, 434, 424, 87, 263, 82, 264, 316, 83, 258, 84, 86, 265,
            88, 266, 133, 259, 85, 76, 77, 90, 91, 268, 92, 93, 94, 260, 165, 272, 308, 160, 302, 29, 64, 68, 319,
            321, 425, 437, 452,
        ),
        56,
        ((2, 1), (257, 2)),
    ),
    "aarch64": Machine(
        0xC00000B7,
        (
            221, 281, 198, 199, 129, 130, 131, 117, 271, 434, 424, 35, 38, 276, 34, 37, 36, 33, 45, 46, 52, 53, 54,
            55, 40, 97, 268, 164, 261, 194, 190, 186, 279, 280, 425, 437, 452,
        ),
        220,
        ((56, 2),),
    ),
}  # fmt: skip


def die_with_parent() -> None:
    """Has this process killed when its parent ends, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, KILL, 0, 0, 0)


def forbid() -> bool:
    """Forbids what is said above, for good; False where this machine's kernel cannot."""
    machine = MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        return False
    program = b"".join(_program(machine))
    text = ctypes.create_string_buffer(program, len(program))
    head = _Program(len(program) // 8, ctypes.addressof(text))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return library.prctl(SET_SECCOMP, FILTER, ctypes.byref(head), 0, 0) == 0


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("text", ctypes.c_void_p)]


def _program(machine: Machine) -> Iterator[bytes]:
    """The filter: each step jumps over the next one or two where its question is answered otherwise."""
    yield _step(LOAD, ARCHITECTURE)
    yield _step(EQUAL, machine.architecture, 1, 0)
    yield _step(RETURN, REFUSE)
    yield _step(LOAD, NUMBER)
    yield from _where(AT_LEAST, FOREIGN, REFUSE)
    yield from _where(EQUAL, machine.clone3, ABSENT)
    for number in machine.refused:
        yield from _where(EQUAL, number, REFUSE)
    for number, argument in machine.opens:
        yield _step(EQUAL, number, 0, 4)
        yield _step(LOAD, ARGUMENTS + 8 * argument)
        yield from _where(ANY_BIT, WRITES, REFUSE)
        yield _step(RETURN, ALLOW)
    yield _step(EQUAL, machine.clone, 0, 3)
    yield _step(LOAD, ARGUMENTS)
    yield _step(ANY_BIT, THREAD, 1, 0)
    yield _step(RETURN, REFUSE)
    yield _step(RETURN, ALLOW)


def _where(question: int, value: int, verdict: int) -> Iterator[bytes]:
    """Returns the verdict where the question is answered with yes."""
    yield _step(question, value, 0, 1)
    yield _step(RETURN, verdict)


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)
