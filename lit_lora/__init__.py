"""LoRA and QLoRA fine-tuning on PyTorch Lightning, where every run proves itself.

The public names load on first use (PEP 562), so that ``import lit_lora`` and ``lit-lora --help`` cost nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent


class _BesideThePackage(importlib.abc.MetaPathFinder):
    """In a source checkout ``callbacks/`` and ``configs/`` lie beside the package; in a wheel they lie inside it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in ("lit_lora.callbacks", "lit_lora.configs"):
            return None
        folder = _here.parent / name.rpartition(".")[2]
        file = folder / "__init__.py"
        if not file.is_file():
            return None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])


if not (_here / "callbacks").is_dir():
    sys.meta_path.insert(0, _BesideThePackage())  # before that of an editable install, which may be of another checkout

_PUBLIC = {
    "LoRAConfig": "config",
    "OptimizationConfig": "config",
    "StepConfig": "config",
    "QuantizationConfig": "config",
    "LoRALightningModule": "module",
    "SFTDataModule": "data.datamodule",
    "DataSource": "data.rows.data_source",
    "InjectionReport": "adapters.inject",
    "inject_lora": "adapters.inject",
    "merge_lora": "adapters.merge",
    "unmerge_lora": "adapters.merge",
    "disable_lora": "adapters.merge",
    "set_adapter": "adapters.named_adapters",
    "adapter_names": "adapters.named_adapters",
    "active_adapters": "adapters.named_adapters",
    "delete_adapter": "adapters.named_adapters",
    "unload_lora": "adapters.named_adapters",
    "mixed_adapters": "adapters.mixed_batch",
    "hotswap_adapter": "interchange.hotswap",
    "combine_adapters": "interchange.combined",
    "compress_adapter": "interchange.compressed",
    "save_adapter": "interchange.peft_format",
    "load_adapter": "interchange.peft_format",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "load_base_model": "base.load",
    "load_tokenizer": "base.load",
    "DataReport": "data.look.report",
    "inspect_data": "data.look.inspection",
    "fit": "runs.fit",
    "Forgetting": "runs.forgetting",
    "Outcome": "report.outcome",
    "load": "evaluation.load",
    "generate": "evaluation.generate",
    "score": "evaluation.score",
    "merge": "evaluation.merge",
    "export": "evaluation.export",
    "MemoryEstimate": "memory.estimate",
    "estimate_memory": "memory.estimate",
    "StepMetrics": "metrics",
    "TrainingMetrics": "metrics",
    "assert_loss_convergence": "metrics",
}
__all__ = [
    "DataReport",
    "DataSource",
    "Forgetting",
    "InjectionReport",
    "LoRAConfig",
    "LoRALightningModule",
    "MemoryEstimate",
    "OptimizationConfig",
    "Outcome",
    "QuantizationConfig",
    "SFTDataModule",
    "StepConfig",
    "StepMetrics",
    "TrainingMetrics",
    "__version__",
    "active_adapters",
    "adapter_names",
    "assert_loss_convergence",
    "combine_adapters",
    "compress_adapter",
    "delete_adapter",
    "disable_lora",
    "estimate_memory",
    "export",
    "fit",
    "generate",
    "hotswap_adapter",
    "inject_lora",
    "inspect_data",
    "linear_cross_entropy",
    "load",
    "load_adapter",
    "load_base_model",
    "load_tokenizer",
    "merge",
    "merge_lora",
    "mixed_adapters",
    "save_adapter",
    "score",
    "set_adapter",
    "unload_lora",
    "unmerge_lora",
]

if TYPE_CHECKING:
    from lit_lora.adapters.inject import InjectionReport, inject_lora
    from lit_lora.adapters.merge import disable_lora, merge_lora, unmerge_lora
    from lit_lora.adapters.mixed_batch import mixed_adapters
    from lit_lora.adapters.named_adapters import (
        active_adapters,
        adapter_names,
        delete_adapter,
        set_adapter,
        unload_lora,
    )
    from lit_lora.base.load import load_base_model, load_tokenizer
    from lit_lora.config import LoRAConfig, OptimizationConfig, QuantizationConfig, StepConfig
    from lit_lora.data.datamodule import SFTDataModule
    from lit_lora.data.look.inspection import inspect_data
    from lit_lora.data.look.report import DataReport
    from lit_lora.data.rows.data_source import DataSource
    from lit_lora.evaluation.export import export
    from lit_lora.evaluation.generate import generate
    from lit_lora.evaluation.load import load
    from lit_lora.evaluation.merge import merge
    from lit_lora.evaluation.score import score
    from lit_lora.interchange.combined import combine_adapters
    from lit_lora.interchange.compressed import compress_adapter
    from lit_lora.interchange.hotswap import hotswap_adapter
    from lit_lora.interchange.peft_format import load_adapter, save_adapter
    from lit_lora.kernels.linear_cross_entropy import linear_cross_entropy
    from lit_lora.memory.estimate import MemoryEstimate, estimate_memory
    from lit_lora.metrics import StepMetrics, TrainingMetrics, assert_loss_convergence
    from lit_lora.module import LoRALightningModule
    from lit_lora.report.outcome import Outcome
    from lit_lora.runs.fit import fit
    from lit_lora.runs.forgetting import Forgetting


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lit_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_lora.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
