"""Running a function on several ranks: real processes, gloo, bounded in time.

Importing takes longer than most of the tests. A server process imports once, before it has any
thread or process group, and every rank is forked from it.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Starting processes takes minutes on a machine that is busy with others.
SECONDS = 600

_IMPORTED_ONCE = [
    "pytest",
    "snparam",
    "torch",
    "torch._dynamo.backends.debugging",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each of `world` ranks.

    The function has to be importable, and what it returns picklable. An error on a rank is raised
    here with its traceback; ranks that have not finished in time are stopped.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    results: Queue[Any] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_run, args=(rank, world, port, results, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + SECONDS
        while len(found) < world:
            try:
                rank, error, value = results.get(timeout=max(0.1, deadline - time.monotonic()))
            except Empty:
                missing = sorted(set(range(world)) - set(found))
                raise AssertionError(f"ranks {missing} did not finish in {SECONDS} s") from None
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = value
    finally:
        for process in processes:
            process.join(10 if len(found) == world else 0)
            process.kill()
            process.join()
    return [found[rank] for rank in range(world)]


def assert_same(found: dict[str, Any], right: dict[str, Any], atol: float = 1e-12) -> None:
    """Whether arrays by name, as they come from a rank, are those that they are to be."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(
            torch.from_numpy(found[name]), torch.from_numpy(value), rtol=1e-9, atol=atol
        )


def assert_bit_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Whether two ranks have the same arrays."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value == second[name]).all(), name


def _run(
    rank: int,
    world: int,
    port: int,
    results: Queue[Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        results.put((rank, None, function(rank, *args)))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  (whatever it is, it is raised in the test)
        results.put((rank, traceback.format_exc(), None))
