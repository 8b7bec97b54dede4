"""LoRA and QLoRA fine-tuning on PyTorch Lightning, where every run proves itself.

The public names load on first use (PEP 562), so that ``import lit_lora`` and ``lit-lora --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
# In a source checkout ``callbacks/`` and ``configs/`` lie beside the package; in a wheel they lie inside it.
if not (_here / "callbacks").is_dir() and (_here.parent / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

_PUBLIC = {
    "LoRAConfig": "config",
    "OptimizationConfig": "config",
    "StepConfig": "config",
    "QuantizationConfig": "config",
    "LoRALightningModule": "module",
    "SFTDataModule": "data.datamodule",
    "InjectionReport": "adapters.inject",
    "inject_lora": "adapters.inject",
    "merge_lora": "adapters.merge",
    "unmerge_lora": "adapters.merge",
    "disable_lora": "adapters.merge",
    "save_adapter": "adapters.peft_format",
    "load_adapter": "adapters.peft_format",
    "linear_cross_entropy": "losses",
    "load_base_model": "models",
    "load_tokenizer": "models",
    "MemoryEstimate": "memory",
    "estimate_memory": "memory",
    "StepMetrics": "metrics",
    "TrainingMetrics": "metrics",
    "assert_loss_convergence": "metrics",
}
__all__ = [
    "InjectionReport",
    "LoRAConfig",
    "LoRALightningModule",
    "MemoryEstimate",
    "OptimizationConfig",
    "QuantizationConfig",
    "SFTDataModule",
    "StepConfig",
    "StepMetrics",
    "TrainingMetrics",
    "__version__",
    "assert_loss_convergence",
    "disable_lora",
    "estimate_memory",
    "inject_lora",
    "linear_cross_entropy",
    "load_adapter",
    "load_base_model",
    "load_tokenizer",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
]

if TYPE_CHECKING:
    from lit_lora.adapters.inject import InjectionReport, inject_lora
    from lit_lora.adapters.merge import disable_lora, merge_lora, unmerge_lora
    from lit_lora.adapters.peft_format import load_adapter, save_adapter
    from lit_lora.config import LoRAConfig, OptimizationConfig, QuantizationConfig, StepConfig
    from lit_lora.data.datamodule import SFTDataModule
    from lit_lora.losses import linear_cross_entropy
    from lit_lora.memory import MemoryEstimate, estimate_memory
    from lit_lora.metrics import StepMetrics, TrainingMetrics, assert_loss_convergence
    from lit_lora.models import load_base_model, load_tokenizer
    from lit_lora.module import LoRALightningModule


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lit_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_lora.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
