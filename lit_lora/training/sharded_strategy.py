"""Strategy ``lora_sharded``: the frozen base divided among processes (FSDP2), the adapters whole in each of them.

To Lightning and to callbacks it is as under DDP: every process has all adapters, with gradients that are the mean over
processes once a step is complete, and checkpoints are those of one process. So a run can be resumed on another number
of processes, sharded or not. Lightning's own ``ModelParallelStrategy`` divides and saves what trains as well; of it the
processes, their mesh and the setup are taken.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from lit_lora.base.base_hash import known_hash
from lit_lora.base.shards import Sharding, is_sharded
from lit_lora.wording import setting

NAME = "lora_sharded"
OFFLOADED = "lora_sharded_cpu_offload"
"""The same with the shares in the memory of the host."""


class LoRAShardedStrategy(ModelParallelStrategy):
    """Divides the frozen base of a ``LoRALightningModule`` among all processes.

    Args:
        process_group_backend: where it is None, gloo on a CPU and nccl on CUDA; with ``cpu_offload`` both, since then
            prompts lie in the memory of the host, and processes ask each other there whether all have answered.
        timeout: after which a process that waits for the others gives up.
        cpu_offload: keep the shares in pinned memory of the host, from which each layer's go to the device while it
            runs; for CUDA.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        cpu_offload: bool = False,
    ) -> None:
        backend = process_group_backend or ("cpu:gloo,cuda:nccl" if cpu_offload else None)
        super().__init__(process_group_backend=backend, timeout=timeout)
        self._reduces = True
        self.cpu_offload = cpu_offload

    # Of one process: adapters are whole, so there is nothing to put together. Lightning's own go through torch's
    # distributed checkpoints, which know no quantized weights, and past the CheckpointIO, which writes atomically.
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    tensor_init_context = Strategy.tensor_init_context  # on the process's own device

    @property
    def sharding(self) -> Sharding:
        """Among which processes the base is divided; known once they have found each other."""
        return Sharding(self.device_mesh["data_parallel"], CPUOffloadPolicy() if self.cpu_offload else None)

    def setup_environment(self) -> None:
        """Let the processes find each other: all of them work on different data.

        Raises:
            ValueError: for an offload to the memory that the base lies in anyway.
        """
        if problem := self.device_problem():
            raise ValueError(problem)
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def device_problem(self) -> str | None:
        """Why the devices of this run are none for its settings, and what to do instead."""
        if not self.cpu_offload or self.root_device.type != "cpu":
            return None
        return (
            f"{setting('trainer.strategy', OFFLOADED)} (cpu_offload) keeps the base in the memory of the CPU between "
            "steps, and on a CPU it is there anyway: it needs a CUDA device. Leave cpu_offload out "
            f"({setting('trainer.strategy', NAME)})"
        )

    def setup(self, trainer: Trainer) -> None:
        """Divide the base where it was loaded whole; let all processes start with the same adapters.

        Raises:
            TypeError: for a module without a base to divide.
        """
        module = self.lightning_module
        model = getattr(module, "model", None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{NAME} divides the base of a LoRALightningModule, and {type(module).__name__} has none")
        if not is_sharded(model):
            if (found := known_hash(model)) is not None:
                _ = found.value  # it may still be reading the weights
            self.sharding.shard_(model)
        with torch.no_grad():
            for part in model.modules():
                trained = [p for p in part.parameters(recurse=False) if p.requires_grad]
                for tensor in (*trained, *(part.buffers(recurse=False) if trained else ())):
                    dist.broadcast(tensor, 0)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Tell the module where it is: its model is there already, each part where it belongs."""
        module: Any = self.lightning_module
        model, module.model = module.model, None
        try:
            module.to(self.root_device)
        finally:
            module.model = model

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Within, gradients are added up in each process on its own: all but the last micro-batch of a step."""
        self._reduces = False
        try:
            yield
        finally:
            self._reduces = True

    def post_backward(self, closure_loss: Tensor) -> None:
        """Once a step, take the mean of the gradients over all processes."""
        if self._reduces and self.world_size > 1:
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            average_gradients([p for group in groups for p in group["params"] if p.requires_grad])


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; one that no process has stays away.

    A layer that one process did not use (an expert, for one) counts as zeros there. One reduction for each dtype.
    """
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        of_dtype = [p for p in parameters if p.dtype == dtype]
        present = torch.tensor([p.grad is not None for p in of_dtype], dtype=dtype, device=of_dtype[0].device)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in of_dtype] + [present])
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        *means, present = flat.split([*(p.numel() for p in of_dtype), len(of_dtype)])
        missing = [p for p in of_dtype if p.grad is None]
        used = set(present.nonzero().flatten().tolist()) if missing else set(range(len(of_dtype)))  # waits for a GPU
        for index, (parameter, mean) in enumerate(zip(of_dtype, means, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif index in used:
                parameter.grad = mean.view_as(parameter).clone()


for name, offloaded in ((NAME, False), (OFFLOADED, True)):
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, LoRAShardedStrategy, description=__doc__ or "", cpu_offload=offloaded)
