"""Regional compilation against the same model run eagerly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_lora.adapters.inject import inject_lora
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_
from lit_lora.build import make_trainable
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.language_model.forward import ForwardPath, language_model_loss
from lit_lora.language_model.trial import choose_path
from lit_lora.memory.activation_budget import measure_activations
from lit_lora.module import LoRALightningModule
from lit_lora.rewrites.compilation import check_compiler, compile_layers
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.tiny import config, examples, language_model

# torch 2.13's compiler uses what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

BATCHES = [(7, 12, 5), (9, 3), (20,), (5, 6, 7, 8)]
"""Lengths of the examples: another number of tokens and of examples each."""

# Float32, relative to the largest element: products are summed in another order.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-5


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and guards as ever, but runs the graphs as they are: seconds instead of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def adapted(quantization: QuantizationConfig | None = None, *, num_layers: int = 10) -> PreTrainedModel:
    model = language_model(num_hidden_layers=num_layers)  # 10: more than are compiled anew before it gives up
    if quantization is not None:
        for layer in model.model.layers:  # not the head, which a run leaves as it is, too
            quantize_(layer, quantization)
    inject_lora(model, LoRAConfig(r=4))
    assert recompute_gated_mlps(model) == num_layers
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(lengths: tuple[int, ...]) -> dict[str, Any]:
    made = examples(lengths, seed=sum(lengths))
    return collate_packed(
        [
            TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
            for i, (ids, mask) in enumerate(made)
        ]
    )


def loss_and_gradients(model: PreTrainedModel, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    path = ForwardPath(packed=True, direct_head=True, reason="")
    loss = language_model_loss(model, batch(lengths), path).nll_sum
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture(params=[False, True], ids=["torch's products", "oneDNN's"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who multiplies, whatever the processor and however small."""
    monkeypatch.setattr(products, "by_amd", lambda: request.param)
    monkeypatch.setattr(products, "_SMALL", 0)


@pytest.mark.real_model  # as slow as they are
@pytest.mark.parametrize(
    ("recomputed", "onednn"), [(0, True), (2, False)], ids=["plain, oneDNN", "checkpointed"], indirect=["onednn"]
)
@pytest.mark.usefixtures("onednn")
def test_generated_code_equals_eager_for_batches_of_any_lengths(recomputed: int) -> None:
    _compiled_equals_eager(recomputed)


@pytest.mark.usefixtures("no_code_generation", "onednn")
@pytest.mark.parametrize("recomputed", [0, 2], ids=["plain", "checkpointed"])
def test_graphs_equal_eager_for_batches_of_any_lengths_without_compiling_again(recomputed: int) -> None:
    _compiled_equals_eager(recomputed)


@pytest.mark.usefixtures("no_code_generation")
@pytest.mark.parametrize(
    "quantization",
    [
        QuantizationConfig(4, block_size=32),
        QuantizationConfig(8),
    ],
    ids=str,
)
def test_graphs_of_a_quantized_base_equal_it_run_eagerly(quantization: QuantizationConfig) -> None:
    _compiled_equals_eager(0, quantization)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_weight_is_not_kept_for_the_backward_pass(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler keeps is chosen without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = adapted(QuantizationConfig(bits, block_size=32) if bits == 4 else QuantizationConfig(bits), num_layers=2)
    choose_path(model)
    compile_layers(model)
    shapes = {module.lora_B.weight.shape[:1] + module.lora_A.weight.shape[1:] for _, module in lora_layers(model)}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradients(model, (7, 12, 5))
    assert len(kept) > 10
    both = shapes | {torch.Size(reversed(shape)) for shape in shapes}
    assert not [tensor.shape for tensor in kept if tensor.is_floating_point() and tensor.shape in both]


def _compiled_equals_eager(recomputed: int, quantization: QuantizationConfig | None = None) -> None:
    eager, compiled = adapted(quantization), adapted(quantization)
    for model in (eager, compiled):
        assert choose_path(model).packed
    names = [name for name, _ in compiled.named_parameters()]
    compile_layers(compiled)
    checkpoint_layers(compiled, recomputed)
    assert [name for name, _ in compiled.named_parameters() if not name.endswith(base_weight.SCALES)] == names
    for number, lengths in enumerate(BATCHES):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = loss_and_gradients(compiled, lengths)
        expected = loss_and_gradients(eager, lengths)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * float(value.abs().max()))
    assert counters["stats"]["unique_graphs"] == 7  # a layer in 4 pieces, 3 of them again for the first layer's input


@pytest.mark.usefixtures("no_code_generation")
def test_graphs_of_the_code_for_cuda_equal_it_run_eagerly() -> None:
    """In float16, where the two differ by how often they round."""

    def built(**step: Any) -> PreTrainedModel:
        model = language_model(std=0.1, num_hidden_layers=3).to(torch.float16)
        make_trainable(model, LoRAConfig(r=4, init_lora_weights=False), StepConfig(**step))
        return model

    with as_on_cuda():
        eager, compiled = built(), built(compile_layers=True)
        for number, lengths in enumerate(BATCHES):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                got = loss_and_gradients(compiled, lengths)
            expected = loss_and_gradients(eager, lengths)
            flat, expected_flat = (torch.cat([g[n].flatten().float() for n in expected]) for g in (got, expected))
            assert float((flat - expected_flat).norm() / expected_flat.norm()) < 0.03
    assert counters["stats"]["unique_graphs"] == 7


def test_generation_runs_the_layers_as_they_were() -> None:
    model = adapted().eval()
    prompt = torch.tensor([[5, 9, 30]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    compile_layers(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.usefixtures("no_code_generation")
def test_training_compiled_gives_the_same_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With validation under inference mode in between, and layers recomputed as a budget needs."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(num_hidden_layers=3).to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    batches = [batch(lengths) for lengths in BATCHES]

    def train(**settings: Any) -> LoRALightningModule:
        module = LoRALightningModule(f"random:{path}", lora=LoRAConfig(r=4), step=StepConfig(**settings))
        trainer = L.Trainer(
            max_steps=4, val_check_interval=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        torch.manual_seed(0)
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, loader)
        return module

    plain = train()
    budget = measure_activations(plain.model, max(map(sum, BATCHES))).needed(1)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        compiled = train(compile_layers=True, recompute=str(budget))
    assert "Compiled layers in" in caplog.text
    assert compiled._activation_budget is not None
    assert compiled._activation_budget.num_layers > 0
    torch.testing.assert_close(
        compiled.training_metrics.losses, plain.training_metrics.losses, rtol=LOSS_TOLERANCE, atol=0
    )
    assert len(compiled.training_metrics.validation) == len(plain.training_metrics.validation) > 0


def test_a_missing_compiler_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/g++",))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* does not work here on cpu: .*/nonexistent/g\+\+"):
        check_compiler(torch.device("cpu"))
    module = LoRALightningModule("no/where", step=StepConfig(compile_layers=True))
    with pytest.raises(ValueError, match="needs a C"):
        module.configure_model()


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of equal layers to compile"):
        compile_layers(torch.nn.Linear(2, 2))
