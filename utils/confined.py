"""Starts a program that cannot reach the secrets of the process that starts it.

Run as a script: `python -I -S utils/confined.py CONFINEMENT_AS_JSON PROGRAM ARGUMENT...`. The
script confines itself and then becomes the program, so no line of the program runs before that,
and its process id stays. It needs only the standard library.

There are three mechanisms; each closes gaps of the others:

- The parent calls `hide_own_memory`: a process that is not dumpable shows its environment, memory
  and open files only to root.
- Root's capabilities are dropped, so that the rule above also holds for a worker that runs as root.
- Landlock (Linux 5.19 or newer) denies the hidden files, changes to the program's own code, reading
  or tracing any process outside, signals to them, and TCP connections to other ports than the
  hub's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LEAST_ABI = 2
"""Landlock's first version that can allow renaming a file into another folder; exports do that."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, on every architecture
_VERSION_FLAG = 1
_PATH_RULE, _PORT_RULE = 1, 2

# Access rights. Rights that are not listed stay allowed: running programs, listing folders, ioctl.
_WRITE_FILE, _READ_FILE = 1 << 1, 1 << 2
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # remove and make entries of every kind
_MOVE, _TRUNCATE = 1 << 13, 1 << 14
_TRUNCATE_ABI, _PORTS_ABI, _SCOPE_ABI = 3, 4, 6
_BIND, _CONNECT = 1, 2
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
# For files of other owners, and for memory that is locked for the GPU. Not more: with SYS_PTRACE,
# SYS_ADMIN, SYS_RAWIO or DAC_READ_SEARCH root could read the parent's memory, or any file.
_KEPT_CAPABILITIES = frozenset({0, 1, 3, 14, 23})  # CHOWN, DAC_OVERRIDE, FOWNER, IPC_LOCK, SYS_NICE


@dataclasses.dataclass(frozen=True, slots=True)
class Confinement:
    """The limits of a program. Paths are absolute, and need not exist yet.

    Attributes:
        hidden: Files and folders that can neither be read nor written, nor made.
        read_only: Folders in which nothing can be changed.
        writable: Folders inside `read_only` that can be written nevertheless.
        ports: TCP ports that can be connected to; none can be listened on.
        among_themselves: The program's processes can connect to each other: ports that the kernel
            gives out can be listened on and connected to. Services have fixed ports outside.
    """

    hidden: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    ports: tuple[int, ...] = (53, 443)
    among_themselves: bool = False

    def command(self, program: Sequence[str]) -> list[str]:
        """The command line that starts a program inside the confinement."""
        return [
            *(sys.executable, "-I", "-S", str(Path(__file__).resolve())),
            json.dumps(dataclasses.asdict(self)),
            *program,
        ]


def landlock_version() -> int:
    """Landlock's version in this kernel; 0 if it is absent, switched off or filtered."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)))


def hide_own_memory() -> None:
    """Deny other processes of this user the environment, memory and open files of this one.

    A crash writes no core file either, in this process and its children: the file would hold every
    secret.
    """
    _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def confine(confinement: Confinement) -> None:
    """Confine this thread and everything that it starts; nothing can undo it.

    Without Landlock (see `landlock_version`) the other two mechanisms still apply.

    Raises:
        OSError: Landlock is there and refuses. The rest is in place.
    """
    _drop_capabilities()
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    version = landlock_version()
    if version < LEAST_ABI:
        return
    ruleset = _ruleset(version)
    try:
        for path, readable_only in _allowed(confinement):
            _allow_path(ruleset, path, _READ_FILE if readable_only else _files(version))
        if version >= _PORTS_ABI:
            _allow_ports(ruleset, _CONNECT, sorted(set(confinement.ports)))
            if confinement.among_themselves:
                _allow_ports(ruleset, _BIND, [0])  # a port that the kernel chooses
                _allow_ports(ruleset, _CONNECT, _chosen_by_the_kernel())
        _check(_libc().syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allowed(confinement: Confinement) -> Iterator[tuple[str, bool]]:
    """The paths that stay allowed, each with whether it is read-only.

    Landlock has no exceptions inside an allowed folder. If a folder contains an exception, each of
    its other entries is allowed separately; entries that are made later are not.
    """
    hidden = {os.path.realpath(path) for path in confinement.hidden}
    read_only = {os.path.realpath(path) for path in confinement.read_only}
    writable = {os.path.realpath(path) for path in confinement.writable}
    mixed = {parent for path in hidden | read_only | writable for parent in _parents(path)}

    def walk(folder: str, readable_only: bool) -> Iterator[tuple[str, bool]]:
        for path in _entries(folder):
            if path in hidden:
                continue
            only = path not in writable and (readable_only or path in read_only)
            if path in mixed:
                yield from walk(path, only)
            else:
                yield path, only

    return walk("/", "/" in read_only)


def _parents(path: str) -> Iterator[str]:
    while path != (path := os.path.dirname(path)):
        yield path


def _entries(folder: str) -> list[str]:
    """Without symbolic links: their targets are judged at their own places."""
    try:
        with os.scandir(folder) as found:
            return [entry.path for entry in found if not entry.is_symlink()]
    except OSError:  # a folder that this user cannot list is not allowed either
        return []


def _files(version: int) -> int:
    """All access rights that the rules list."""
    rights = _READ_FILE | _WRITE_FILE | _CHANGE_FOLDER | _MOVE
    return rights | (_TRUNCATE if version >= _TRUNCATE_ABI else 0)


def _ruleset(version: int) -> int:
    attributes = struct.pack("=Q", _files(version))
    if version >= _PORTS_ABI:
        attributes += struct.pack("=Q", _BIND | _CONNECT)
    if version >= _SCOPE_ABI:
        attributes += struct.pack("=Q", _ABSTRACT_SOCKETS | _SIGNALS)
    made = _libc().syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    return _check(made, "landlock_create_ruleset")


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # removed since it was listed, or closed to this user in any case
        return
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        if _add_rule(ruleset, _PATH_RULE, struct.pack("=Qi", rights, handle)) < 0:
            if ctypes.get_errno() != errno.EBADFD:  # a file of a file system inside the kernel
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(handle)


def _allow_ports(ruleset: int, rights: int, ports: Iterable[int]) -> None:
    for port in ports:
        rule = struct.pack("=QQ", rights, port)
        _check(_add_rule(ruleset, _PORT_RULE, rule), "landlock_add_rule")


def _chosen_by_the_kernel() -> range:
    """The ports that a program gets if it asks for any."""
    try:
        first, last = map(int, _PORT_RANGE.read_text("ascii").split())
    except (OSError, ValueError):
        return range(32768, 61000)
    return range(first, last + 1)


def _add_rule(ruleset: int, kind: int, rule: bytes) -> int:
    return int(_libc().syscall(_ADD_RULE, ruleset, kind, rule, 0))


def _drop_capabilities() -> None:
    """Leave root the few capabilities that training may need; a user without any keeps none."""
    libc = _libc()
    for capability in set(range(_LAST_CAPABILITY + 1)) - _KEPT_CAPABILITIES:
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    # Inheritable capabilities would return with the program.
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)  # effective, permitted and inheritable, twice 32 bits
    if libc.capget(header, held) == 0:
        low = struct.unpack("=6I", held.raw)
        libc.capset(header, struct.pack("=6I", low[0], low[1], 0, low[3], low[4], 0))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> int:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise OSError(
            ctypes.get_errno(),
            f"{call} failed: {reason}. Allow this call in the seccomp profile of the container",
        )
    return result


def main(arguments: Sequence[str]) -> None:
    """Confine this process and become the program."""
    values, *program = arguments
    given: dict[str, Any] = json.loads(values)
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    confinement = Confinement(**given | lists)
    try:
        confine(confinement)
    except OSError as error:
        # Training continues; the operator reads this line and decides whether that is acceptable.
        print(f"the trainer is not confined: {error}", file=sys.stderr, flush=True)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
