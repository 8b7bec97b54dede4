"""What PyTorch's CUDA allocator reserves for a sequence of storages: a replay of its rules, without a device.

The rules, from ``c10/cuda/CUDACachingAllocator.cpp``: sizes are rounded up to 512 bytes. Up to 1 MiB comes from
segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own, rounded up to 2 MiB. The
smallest free block that is large enough is taken, and split if enough is left over; neighbours that are free join.
Segments are kept. Left out: expandable segments, several streams, garbage collection.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

_MIB = 1 << 20
_SMALL, _SMALL_SEGMENT = _MIB, 2 * _MIB
_MEDIUM, _MEDIUM_SEGMENT = 10 * _MIB, 20 * _MIB


@dataclass(frozen=True)
class CudaPeak:
    """The allocator at its highest."""

    allocated: int
    """``torch.cuda.max_memory_allocated``, bytes."""
    reserved: int
    """``torch.cuda.max_memory_reserved``, bytes: what other processes cannot have."""


@dataclass(eq=False)
class _Block:
    address: int
    size: int
    segment: int
    free: bool = True


class _Pool:
    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.reserved = 0
        self._free: list[tuple[int, int]] = []
        self._starts: dict[int, _Block] = {}
        self._ends: dict[int, _Block] = {}

    def allocate(self, size: int) -> _Block:
        at = bisect_left(self._free, (size, -1))
        if at < len(self._free):
            _, address = self._free.pop(at)
            block = self._starts[address]
        else:
            segment = _segment_size(size)
            # A gap between segments, so that blocks of two never join.
            block = _Block(self.reserved * 2 + 1, segment, segment)
            self.reserved += segment
            self._put(block)
        rest = block.size - size
        if rest >= 512 if self.small else rest > _SMALL:
            self._ends.pop(block.address + block.size)
            left = _Block(block.address + size, rest, block.segment)
            block.size = size
            self._put(block)
            self._put(left)
            insort(self._free, (left.size, left.address))
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        block.free = True
        before = self._ends.get(block.address)
        after = self._starts.get(block.address + block.size)
        for neighbour in (before, after):
            if neighbour is not None and neighbour.free:
                self._free.pop(bisect_left(self._free, (neighbour.size, neighbour.address)))
                first, second = sorted((neighbour, block), key=lambda b: b.address)
                self._ends.pop(first.address + first.size)
                self._starts.pop(second.address)
                first.size += second.size
                first.free = True
                self._put(first)
                block = first
        insort(self._free, (block.size, block.address))

    def _put(self, block: _Block) -> None:
        self._starts[block.address] = block
        self._ends[block.address + block.size] = block


def replay(changes: Iterable[tuple[int, int]]) -> CudaPeak:
    """Allocate and free in this order.

    Args:
        changes: ``(key, bytes)`` where a storage is made, ``(key, -bytes)`` where it goes.
    """
    pools = {True: _Pool(small=True), False: _Pool(small=False)}
    blocks: dict[int, _Block] = {}
    allocated = peak = 0
    for key, num_bytes in changes:
        if num_bytes > 0:
            size = -(-num_bytes // 512) * 512
            blocks[key] = pools[size <= _SMALL].allocate(size)
            allocated += blocks[key].size
            peak = max(peak, allocated)
        elif key in blocks:
            block = blocks.pop(key)
            allocated -= block.size
            pools[abs(num_bytes) <= _SMALL].release(block)
    return CudaPeak(peak, sum(pool.reserved for pool in pools.values()))


def _segment_size(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MEDIUM:
        return _MEDIUM_SEGMENT
    return -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
