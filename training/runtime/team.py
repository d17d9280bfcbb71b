"""The processes that train one run together, and what they exchange.

Every process of a team runs the same code on the same data, one to a GPU. They exchange three
things: votes, sums and hashes. Every exchange begins with a vote, so that a process that has failed
can report it, and no process waits for one that will not come. Only process 0 has the desk's pipe.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from jobs.kinds import TrainerOptions
from training.runtime.device import out_of_memory
from training.runtime.followers import PEER_FAILED, PeerFailed, TeamBroken
from utils.errors import Stopped, StopReason, TrainingFailed

LONGEST_WAIT_IN_STALLS = 12
"""A process may wait this many times STALL_SECONDS for the others, as the desk waits for events."""

_REASONS = tuple(StopReason)
_GO_ON, _NO_MEMORY, _FAILED = 0, 100, 200

T = TypeVar("T")


class Team:
    """The processes that train a run together; without arguments, a single process.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        shards: Whether the processes share the weights of the base out, so that every forward pass
            needs all of them.

    Args:
        votes: Process group for votes and hashes, on the CPU.
        sums: Process group for sums, on the device.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        votes: Any = None,
        sums: Any = None,
        shards: bool = False,
    ) -> None:
        self.rank, self.size, self.shards = rank, size, shards
        self._votes, self._sums = votes, sums

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and sends the events."""
        return self.rank == 0

    def stop_reason(self, should_stop: Callable[[], StopReason | None]) -> StopReason | None:
        """The reason to stop, the same in all processes. Only process 0 hears the desk."""
        reason = should_stop()
        if self.size == 1:
            return reason
        agreed = self._vote(_REASONS.index(reason) + 1 if reason else _GO_ON)
        return _REASONS[agreed - 1] if agreed else None

    def meet(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            self._vote(_GO_ON)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place. The sum has the same bits in all of them."""
        if self.size > 1:
            self.meet()
            with _answers_expected():
                dist.all_reduce(tensor, group=self._sums)
        return tensor

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Do a part of a step. If one process lacks the memory for it, all of them fail.

        Raises:
            OutOfMemoryError: This process or another one has too little memory.
        """
        if self.size == 1:
            return work()
        lack: Exception | None = None
        try:
            done = work()
        except Exception as error:  # pylint: disable=broad-exception-caught  # raised again below
            if not out_of_memory(error):
                raise
            lack = error
        if self._vote(_NO_MEMORY if lack else _GO_ON) == _NO_MEMORY:
            raise lack or torch.OutOfMemoryError("CUDA out of memory in another process")
        return done

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Within the block, an error of one process ends the block in all of them.

        Raises:
            PeerFailed: Another process has failed.
            TeamBroken: Another process does not answer.
        """
        try:
            yield
        except (Stopped, PeerFailed, TeamBroken):
            raise  # all processes know
        except Exception:
            # With FSDP the others may be in a forward pass, which no vote ends. The process that
            # has failed reports it, and process 0 ends the run for all.
            if self.size > 1 and not self.shards:
                with contextlib.suppress(TeamBroken):
                    self._vote(_FAILED)
            raise

    def refuse_difference(self, name: str, content: Iterable[bytes]) -> None:
        """Compare a hash of content over the processes.

        Args:
            name: The content, for the message.
            content: Its parts, in order.

        Raises:
            TrainingFailed: The content is not the same in all processes.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for part in content:
            digest.update(part)
        self.meet()
        own = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with _answers_expected():
            dist.all_gather(every, own, group=self._votes)
        if any(not torch.equal(own, other) for other in every):
            raise TrainingFailed(
                f"The {self.size} processes of the training have different {name}. Set "
                "TRAINER_PROCESSES=1, and report this."
            )

    def shard(self, model: torch.nn.Module, blocks: Iterable[torch.nn.Module], kind: str) -> None:
        """Share the weights of a model out among the processes (FSDP).

        A block's weights are collected for its forward and its backward pass only. Adapters that
        are added later are whole in every process.

        Args:
            model: The frozen model, whole in every process.
            blocks: Its repeated parts.
            kind: Type of the device, such as `cuda`.
        """
        mesh = DeviceMesh.from_group(self._sums, kind)
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def _vote(self, value: int) -> int:
        """The highest value of all processes."""
        ballot = torch.tensor(value)
        with _answers_expected():
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._votes)
        highest = int(ballot)
        if highest == _FAILED != value:
            raise PeerFailed(PEER_FAILED)
        return highest


ALONE = Team()


def join(options: TrainerOptions) -> Team:
    """Join the other processes of this trainer; returns when all are there.

    The environment keeps their connections on this machine (see `utils.settings.surroundings`).

    Raises:
        TeamBroken: Not all of them come in time.
    """
    if options.processes == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(options.rank)
    longest = datetime.timedelta(seconds=LONGEST_WAIT_IN_STALLS * options.stall_seconds)
    stall = datetime.timedelta(seconds=options.stall_seconds)
    with _answers_expected():
        dist.init_process_group(
            "gloo",
            store=FileStore(str(Path(options.meeting) / "store"), options.processes),
            rank=options.rank,
            world_size=options.processes,
            timeout=longest,
        )
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        sums = dist.new_group(backend=backend, timeout=stall)
    return Team(
        options.rank,
        options.processes,
        votes=dist.group.WORLD,
        sums=sums,
        shards=options.fsdp,
    )


@contextlib.contextmanager
def _answers_expected() -> Iterator[None]:
    """Errors of a connection as ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise TeamBroken(
            f"A process of the training does not answer ({str(error).splitlines()[0][:200]})."
        ) from error
