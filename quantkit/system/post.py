"""Post between processes of one machine: any objects that can be pickled, tensors in them sent as they are.

It goes through ``torch.distributed``: gloo for what is on a CPU and for all else that is told, NCCL for tensors of GPUs
where each process has one of its own. Every process exchanges as often as the others. One that fails says so in the
place of its next letter, and the others raise the same error. Letters are signed by a key that lies in the folder where
processes find each other, as other users of the machine can reach a port of it, and what is pickled can run code.
"""

from __future__ import annotations

import hmac
import io
import pickle
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from quantkit.errors import QuantkitError
from quantkit.system.os_errors import cpu_ran_out

PATIENCE = timedelta(days=1)
"""How long one waits for another, which may be solving; one that ends is noticed at once."""
JOINING = timedelta(minutes=5)
"""How long all take at most to join when each has come."""
BEAT = 0.05
"""Seconds between two looks at who has come."""
LOOPBACK = "127.0.0.1"
KEY, HERE = "key", "here"
DIGEST = "sha256"


class LostError(QuantkitError):
    """Another process of the same work ended before it was done."""


@dataclass(frozen=True, slots=True)
class _Letter:
    """What is sent before tensors are.

    Attributes:
        content: pickled, with a number in the place of each tensor.
        tensors: dtype, shape, and whether it is on a GPU, of each.
    """

    content: bytes
    tensors: Told


class _Failed:
    """In the place of a letter: the error with which a process ended its work."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Post:
    """The post of one process.

    Args:
        folder: where processes find each other; empty at first, the same for all, and closed to other users.
        rank: of this one, from 0.
        size: how many there are.
        device: of this one.
        nccl: tensors of GPUs go through NCCL, for which each process has a GPU of its own; else through memory.
        one_is_gone: whether another one has ended before all had come, for who can know.

    Raises:
        LostError: one has.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        device: torch.device,
        *,
        nccl: bool = False,
        one_is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._is_broken = False
        self._waiter = ThreadPoolExecutor(1)
        torch_groups: Any = distributed  # what stubs say of these classes is not what they have
        gloo = torch_groups.ProcessGroupGloo
        store = torch_groups.FileStore(str(folder / "store"), size)
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = JOINING
        self._key = self._met(store, one_is_gone)
        with self._noticing():
            self._gloo: Any = gloo(store, rank, size, options)
            self._nccl: Any = None
            if nccl:
                torch.cuda.set_device(device)
                settings = torch_groups.ProcessGroupNCCL.Options()
                settings._timeout = PATIENCE
                prefixed = torch_groups.PrefixStore("nccl", store)
                self._nccl = torch_groups.ProcessGroupNCCL(prefixed, rank, size, settings)

    def _met(self, store: Any, one_is_gone: Callable[[], bool]) -> bytes:
        """Wait until all have come; returns the key of their letters."""
        if self.rank == 0:
            store.set(KEY, secrets.token_hex(32))
        store.set(f"{HERE} {self.rank}", "")
        while not store.check([f"{HERE} {rank}" for rank in range(self.size)]):
            if one_is_gone():
                raise _lost()
            time.sleep(BEAT)
        return bytes(store.get(KEY))

    def exchange(self, outgoing: Mapping[int, Any]) -> dict[int, Any]:
        """Send each other process what is for it, and return what the others had for this one, by their ranks.

        Raises:
            LostError: another one has ended.
            BaseException: what another one failed with.
        """
        letters, tensors = {}, {}
        for rank in self._others():
            letters[rank], tensors[rank] = _packed(outgoing.get(rank))
        with self._noticing():
            found = self._told(letters)
        for letter in found.values():
            if isinstance(letter, _Failed):
                raise letter.error
        with self._noticing():
            arrived = self._sent(tensors, {rank: letter.tensors for rank, letter in found.items()})
        return {rank: _unpacked(letter.content, arrived[rank]) for rank, letter in found.items()}

    def fail(self, error: BaseException) -> bool:
        """Tell the others at their next exchange that this process cannot go on.

        Returns:
            False where they cannot be told, as in the middle of an exchange: that it ends has to tell them.
        """
        if self._is_broken:
            return False
        try:
            with self._noticing():
                self._told(dict.fromkeys(self._others(), _Failed(_portable(error))))
        except LostError:
            return False
        return True

    def close(self) -> None:
        """Let go of threads, ports and what NCCL holds of a GPU; the other processes have ended, or need no more."""
        self._waiter.shutdown()
        self._gloo = self._nccl = None

    def _others(self) -> list[int]:
        """The other ranks, from the next on."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _told(self, letters: Mapping[int, Any]) -> dict[int, Any]:
        """Send and receive letters, without the tensors."""
        packed = {rank: self._signed(pickle.dumps(letter)) for rank, letter in letters.items()}
        sizes = {rank: torch.tensor([len(data)]) for rank, data in packed.items()}
        data = {rank: torch.frombuffer(bytearray(each), dtype=torch.uint8) for rank, each in packed.items()}
        work = [self._gloo.send([each], rank, 0) for rank, each in sizes.items()]
        work += [self._gloo.send([each], rank, 0) for rank, each in data.items()]
        found = {}
        for rank in letters:
            size = torch.zeros(1, dtype=torch.int64)
            self._await(self._gloo.recv([size], rank, 0))
            content = torch.empty(int(size), dtype=torch.uint8)
            self._gloo.recv([content], rank, 0).wait(PATIENCE)
            found[rank] = pickle.loads(self._opened(content.numpy().tobytes()))
        for each in work:
            each.wait(PATIENCE)
        return found

    def _await(self, work: Any) -> None:
        """Wait for what may take long in another thread, so that this one hears a request to stop."""
        self._waiter.submit(work.wait, PATIENCE).result()

    def _signed(self, content: bytes) -> bytes:
        return hmac.digest(self._key, content, DIGEST) + content

    def _opened(self, letter: bytes) -> bytes:
        """What a letter holds that one of these processes has written."""
        size = hmac.new(self._key, digestmod=DIGEST).digest_size
        if not hmac.compare_digest(letter[:size], hmac.digest(self._key, letter[size:], DIGEST)):
            raise ConnectionError("what came is from another process")
        return letter[size:]

    def _sent(self, outgoing: Mapping[int, list[torch.Tensor]], incoming: Mapping[int, Told]) -> _Arrived:
        """Send and receive tensors, in the same order at both ends."""
        arrived = {
            rank: [torch.empty(shape, dtype=dtype, device=self.device if gpu else "cpu") for dtype, shape, gpu in told]
            for rank, told in incoming.items()
        }
        if self._nccl is None:
            self._by_gloo(outgoing, arrived)
            return arrived
        self._by_gloo(
            {rank: [each for each in sent if not each.is_cuda] for rank, sent in outgoing.items()},
            {rank: [each for each in places if not each.is_cuda] for rank, places in arrived.items()},
        )
        self._by_nccl(self._nccl, outgoing, arrived)
        return arrived

    def _by_gloo(self, outgoing: Mapping[int, list[torch.Tensor]], arrived: _Arrived) -> None:
        work, kept = [], []
        for rank, tensors in outgoing.items():
            for tensor in filter(torch.Tensor.numel, tensors):
                kept.append(_bytes(tensor.cpu()))
                work.append(self._gloo.send([kept[-1]], rank, 1))
        for rank, places in arrived.items():
            for place in filter(torch.Tensor.numel, places):
                here = _bytes(place.cpu())
                self._gloo.recv([here], rank, 1).wait(PATIENCE)
                if place.is_cuda:
                    _bytes(place).copy_(here)
        for each in work:
            each.wait(PATIENCE)

    def _by_nccl(self, nccl: Any, outgoing: Mapping[int, list[torch.Tensor]], arrived: _Arrived) -> None:
        """Pairs in the same order everywhere, and in each pair the lower rank sends first: NCCL waits for its match."""
        work = []
        for rank in sorted(outgoing):
            sends = [(nccl.send, _bytes(each)) for each in outgoing[rank] if each.is_cuda and each.numel()]
            receives = [(nccl.recv, _bytes(each)) for each in arrived[rank] if each.is_cuda and each.numel()]
            for move, data in [*sends, *receives] if self.rank < rank else [*receives, *sends]:
                work.append(move([data], rank, 0))
        for each in work:
            each.wait()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Inside the block, a process that is gone is told in one line; after an error nothing can be exchanged."""
        try:
            yield
        except (RuntimeError, OSError, MemoryError) as error:
            self._is_broken = True
            if isinstance(error, torch.OutOfMemoryError) or cpu_ran_out(error):
                raise
            first = next(iter(str(error).splitlines()), "")
            raise _lost() from ConnectionError(first)


def _lost() -> LostError:
    problem = "another process that this one walked with has ended"
    return LostError(problem, "the same command goes on from what is finished")


Told = tuple[tuple[torch.dtype, tuple[int, ...], bool], ...]
_Arrived = dict[int, list[torch.Tensor]]


class _Pickler(pickle.Pickler):
    """Leaves tensors out, in the order in which it comes to them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, given: Any) -> int | None:
        """The place of a tensor; None of all else."""
        if type(given) is not torch.Tensor:
            return None
        if id(given) not in self._places:
            self._places[id(given)] = len(self.tensors)
            self.tensors.append(given)
        return self._places[id(given)]


class _Unpickler(pickle.Unpickler):
    """Puts tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> torch.Tensor:
        """The tensor of a place."""
        return self._tensors[int(place)]


def _packed(content: Any) -> tuple[_Letter, list[torch.Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    tensors = [each.detach().contiguous() for each in pickler.tensors]
    told = tuple((each.dtype, tuple(each.shape), each.is_cuda) for each in tensors)
    return _Letter(file.getvalue(), told), tensors


def _unpacked(content: bytes, tensors: list[torch.Tensor]) -> Any:
    return _Unpickler(io.BytesIO(content), tensors).load()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a row of bytes, in the same memory."""
    found: torch.Tensor = tensor.reshape(-1).view(torch.uint8)
    return found


def _portable(error: BaseException) -> BaseException:
    """An error that can be pickled: itself, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # errors of any library may not be made to be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
