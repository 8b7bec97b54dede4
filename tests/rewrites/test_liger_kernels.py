"""What a CPU can say about Liger's kernels: how they are refused. The kernels themselves need CUDA."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from lit_lora.config import StepConfig
from lit_lora.module import LoRALightningModule
from lit_lora.rewrites import liger_kernels
from tests.tiny import language_model

CUDA = torch.device("cuda")


def test_a_device_without_cuda_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="liger needs a CUDA device, this run is on cpu: set liger to false"):
        LoRALightningModule("no/where", step=StepConfig(liger=True)).configure_model()


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lit_lora\[liger\]'"):
        liger_kernels.check_available(CUDA)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Stands in for liger-kernel, which cannot be imported without Triton: its names, and its table with one model."""
    made: list[dict[str, object]] = []

    def apply_liger_kernel_to_llama(
        rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, swiglu: bool = True,
        model: object = None,
    ) -> None: ...  # fmt: skip

    package, transformers, patch = (
        ModuleType(f"liger_kernel{name}") for name in ("", ".transformers", ".transformers.monkey_patch")
    )
    transformers._apply_liger_kernel_to_instance = lambda **settings: made.append(settings)  # type: ignore[attr-defined]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}  # type: ignore[attr-defined]
    for module in (package, transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_the_loss_stays_ours(calls: list[dict[str, object]]) -> None:
    model = language_model()
    assert liger_kernels.apply(model) == ["rope", "swiglu"]
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_model_without_kernels_is_refused(calls: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="no kernels for model type 'gpt_neox'; it has some for llama"):
        liger_kernels.apply(language_model("GPTNeoX"))
    with pytest.raises(ValueError, match="no kernels for model type 'Linear'"):
        liger_kernels.apply(torch.nn.Linear(2, 2))
    assert not calls


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"compile_layers": True}, "fuse the same operations"), ({"recompute": "1GiB"}, "without values")],
)
def test_what_does_not_go_together_is_refused(setting: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        StepConfig(liger=True, **setting)  # type: ignore[arg-type]
