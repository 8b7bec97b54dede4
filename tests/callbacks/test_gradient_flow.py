"""Adapters that do not train and a base that does are found and named."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from plain_projects import AdapterModel, PlainModel
from torch import nn

from lit_lora.callbacks import GradientFlowAssertion, GradientFlowError
from lit_lora.callbacks._support.checksum import checksum, checksums, frozen_tensors


class DeadLayer(AdapterModel):
    def forward(self, x):
        return self.layers[0](x)


class WarmUp(AdapterModel):
    """The first two steps have a learning rate of zero."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RogueOptimizer(AdapterModel):
    """Weight decay reaches a frozen weight."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 2:
            with torch.no_grad():
                self.layers[1].base_layer.weight[3, 4] *= 1.0001


class LeftOut(AdapterModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.layers[0].parameters(), lr=0.01)


@pytest.mark.parametrize("model", [AdapterModel, PlainModel, WarmUp])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_healthy_run_passes(make_trainer, model, accumulate):
    callback = GradientFlowAssertion()
    make_trainer(callback, accumulate_grad_batches=accumulate).fit(model())
    assert callback.verdict.passed, callback.verdict


def test_dead_adapter_is_named_before_the_second_step(make_trainer):
    callback = GradientFlowAssertion()
    trainer = make_trainer(callback)
    with pytest.raises(GradientFlowError, match=r"layers.1.lora_A.weight, layers.1.lora_B.weight .*of layers.1"):
        trainer.fit(DeadLayer())
    assert trainer.global_step == 1
    assert callback.verdict.passed is False


def test_dead_adapter_fails_at_the_end_without_the_early_check(make_trainer):
    trainer = make_trainer(GradientFlowAssertion(check_after_steps=None))
    with pytest.raises(GradientFlowError, match="2 of 4 trainable parameters had no gradient"):
        trainer.fit(DeadLayer())
    assert trainer.global_step == 8


def test_rarely_used_adapter_passes_where_the_check_waits(make_trainer):
    class Rare(AdapterModel):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls > 3 else self.layers[0](x)

    callback = GradientFlowAssertion(check_after_steps=6)
    make_trainer(callback).fit(Rare())
    assert callback.verdict.passed


def test_learning_rate_of_zero_is_found_and_said(make_trainer):
    class Frozen(AdapterModel):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    with pytest.raises(GradientFlowError, match="learning rate"):
        make_trainer(GradientFlowAssertion()).fit(Frozen())


def test_parameters_left_out_of_the_optimizer_are_named(make_trainer):
    with pytest.raises(GradientFlowError, match=r"layers.1.lora_B.weight.*left out of the optimizer"):
        make_trainer(GradientFlowAssertion()).fit(LeftOut())


def test_changed_base_is_named(make_trainer):
    callback = GradientFlowAssertion()
    with pytest.raises(GradientFlowError, match=r"frozen base changed in 1 tensors: layers.1.base_layer.weight"):
        make_trainer(callback).fit(RogueOptimizer())
    assert callback.verdict.passed is False
    off = GradientFlowAssertion(check_base=False)
    make_trainer(off).fit(RogueOptimizer())
    assert off.verdict.passed


def test_changed_buffer_is_named(make_trainer):
    class Drifting(AdapterModel):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.scale[0] = 2.0

    with pytest.warns(UserWarning, match="frozen base changed in 1 tensors: scale"):
        make_trainer(GradientFlowAssertion(on_failure="warn")).fit(Drifting())


def test_non_finite_gradient_is_named(make_trainer):
    model = AdapterModel()
    model.layers[0].lora_B.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(GradientFlowError, match=r"1 parameters are not finite: layers.0.lora_B.weight"):
        make_trainer(GradientFlowAssertion()).fit(model)


def test_nothing_trainable_is_an_error_at_the_start(make_trainer):
    class Frozen(PlainModel):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(GradientFlowError, match="no parameter requires a gradient"):
        make_trainer(GradientFlowAssertion()).fit(Frozen())


class AdapterOnly(AdapterModel):
    """Its checkpoints hold no base."""

    strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "lora_" in key}


@pytest.fixture
def resume(make_trainer, tmp_path):
    """Train four steps, then go on with another module or callback."""

    def run(module: pl.LightningModule, callback: GradientFlowAssertion, max_steps: int = 8) -> None:
        first = GradientFlowAssertion()
        trainer = make_trainer(first, max_steps=4, limit_train_batches=4)
        trainer.fit(AdapterOnly())
        assert first.verdict.passed
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        make_trainer(callback, max_steps=max_steps, limit_train_batches=4).fit(
            module, ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )

    return run


def with_one_bit_changed() -> AdapterOnly:
    module = AdapterOnly()
    module.layers[0].base_layer.weight.data.view(-1).view(torch.int32)[0] ^= 1
    return module


@pytest.mark.parametrize("max_steps", [8, 4], ids=["steps left", "no step left"])
def test_one_bit_of_the_base_changed_before_a_resume_is_an_error(resume, max_steps):
    callback = GradientFlowAssertion()
    with pytest.raises(GradientFlowError, match=r"base (differs|changed) in 1 tensors.*layers.0.base_layer.weight"):
        resume(with_one_bit_changed(), callback, max_steps)
    assert callback.verdict.passed is False


def test_a_base_that_changed_is_not_forgotten_by_training_on(resume, make_trainer, tmp_path):
    callback = GradientFlowAssertion(on_failure="warn")
    with pytest.warns(UserWarning, match=r"base (differs|changed) in 1 tensors"):
        resume(with_one_bit_changed(), callback)
    assert callback.verdict.passed is False

    class Rogue(AdapterOnly, RogueOptimizer):
        pass

    trainer = make_trainer(GradientFlowAssertion(on_failure="warn"), limit_train_batches=4)
    with pytest.warns(UserWarning, match="frozen base changed"):
        trainer.fit(Rogue())
    trainer.save_checkpoint(tmp_path / "rogue.ckpt")
    later = GradientFlowAssertion()
    with pytest.raises(GradientFlowError, match="frozen base changed in 1 tensors"):
        make_trainer(later, max_steps=12, limit_train_batches=4).fit(
            AdapterOnly(), ckpt_path=tmp_path / "rogue.ckpt", weights_only=True
        )


def test_a_base_in_another_dtype_is_said_and_compared_from_there(resume):
    module = AdapterOnly()
    module.scale = module.scale.half()
    callback = GradientFlowAssertion()
    with pytest.warns(UserWarning, match="loaded in another dtype when the run began"):
        resume(module, callback)
    assert callback.verdict.passed


def test_a_run_without_a_step_left_is_judged_by_its_checkpoint(resume):
    callback = GradientFlowAssertion()
    resume(AdapterOnly(), callback, max_steps=4)
    assert callback.verdict.passed, callback.verdict


@pytest.mark.parametrize("on_failure", ["raise", "warn"])
@pytest.mark.parametrize("settings", [{"max_steps": 1}, {"fast_dev_run": True}], ids=str)
def test_one_step_is_not_judged(make_trainer, settings, on_failure):
    callback = GradientFlowAssertion(on_failure=on_failure)
    make_trainer(callback, **settings).fit(AdapterModel())
    assert callback.verdict.passed is None
    assert "on the second step" in callback.verdict.detail


def test_weight_decay_that_moves_a_tensor_without_a_gradient_is_no_gradient(make_trainer):
    class Decayed(DeadLayer):
        def forward(self, x):
            return self.layers[0](x) + 0 * self.layers[1](x)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)

    with pytest.raises(GradientFlowError, match="2 of 4 trainable parameters had no gradient"):
        make_trainer(GradientFlowAssertion(check_after_steps=None)).fit(Decayed())


TENSORS = {
    "float32": torch.randn(100, 7),
    "bfloat16, odd length": torch.randn(13).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "packed 4 bits": torch.randint(0, 255, (64, 1), dtype=torch.uint8),
    "transposed": torch.randn(8, 6).T,
    "slice at an odd offset": torch.randn(9).half()[1:],
    "more than one chunk": torch.arange(2**16 + 5, dtype=torch.int32),
    "empty": torch.empty(0),
    "scalar": torch.tensor(3.0),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_checksum_depends_on_bits_alone(kind):
    tensor = TENSORS[kind]
    (original, copy) = checksums([tensor, tensor.clone()])
    assert original == copy
    if tensor.numel():
        changed = tensor.clone().contiguous()
        flat = changed.view(-1).view(torch.uint8)
        flat[-1] ^= 1  # one bit
        assert checksums([changed]) != [original]
    if tensor.numel() > 2:
        swapped = tensor.clone().contiguous()
        flat = swapped.view(-1)
        flat[[0, 1]] = flat[[1, 0]]
        assert torch.equal(swapped, tensor) or checksums([swapped]) != [original]


def test_checksum_equals_its_definition():
    words = torch.randint(-(2**31), 2**31 - 1, (3 * 2**16 + 3,), dtype=torch.int32)
    wide = words.to(torch.int64)
    expected = torch.stack([wide.sum(), (wide * torch.arange(wide.numel())).sum()])
    assert torch.equal(checksum(words), expected)


def test_negative_zero_is_another_bit_pattern():
    assert checksums([torch.tensor([0.0])]) != checksums([torch.tensor([-0.0])])


def test_frozen_tensors_hold_quantization_scales_and_leave_caches_out():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Module()
    model.quantized = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    model.norm = nn.BatchNorm1d(4)
    model.register_buffer("cache", torch.ones(1), persistent=False)
    model.register_buffer("kept", torch.ones(1))
    model.quantized.requires_grad_(False)
    names = set(frozen_tensors(model))
    assert {"quantized.weight", "quantized.weight.absmax", "kept"} <= names
    assert not any("cache" in name or "norm" in name for name in names)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="on the first step"):
        GradientFlowAssertion(check_after_steps=1)
    with pytest.raises(ValueError, match="on_failure"):
        GradientFlowAssertion(on_failure="ignore")


def test_interrupt_before_training_is_no_verdict(make_trainer):
    class Breaks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise KeyError("before")

    callback = GradientFlowAssertion()
    with pytest.raises(KeyError):
        make_trainer(Breaks(), callback).fit(AdapterModel())
    assert callback.verdict.passed is None
