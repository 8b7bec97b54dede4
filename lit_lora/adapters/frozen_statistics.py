"""Batch norms of a frozen base stay in evaluation: in training mode their running statistics would move."""

from __future__ import annotations

from torch import nn


def keep_batch_norm_frozen(model: nn.Module) -> None:
    """Put every batch norm without trainable parameters into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()
