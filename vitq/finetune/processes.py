"""Data-parallel training: several processes, each with its part of every batch, and one mean of their gradients.

`torchrun` starts them and says in the environment which one this is; torch.distributed does the rest (gloo on CPUs, nccl on GPUs). All
start at the same variables and take the same steps, so nothing but gradients, and what one process alone measures, is exchanged.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`, and computes on `device`."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def average(self, variables: Sequence[Tensor]) -> None:
        """Replaces the gradients of the variables by their means over the processes."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in variables]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= self.count
        for variable, part in zip(variables, together.split([v.numel() for v in variables]), strict=True):
            variable.grad = part.reshape(variable.shape)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            distributed.barrier()

    def agreed(self, value: float) -> float:
        """The leading process's value, in all of them."""
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.broadcast(held, 0)
        return float(held)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that `torchrun` started, joined while inside; this one alone where it did not. On `cuda`, each has a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(device=device)
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if own.startswith("cuda"):
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), own)
    finally:
        distributed.destroy_process_group()
