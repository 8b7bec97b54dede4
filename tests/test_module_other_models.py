"""LoRALightningModule on models that are no decoder of language, by two hooks: an encoder-decoder, images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM

from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    OptimizationConfig,
    assert_loss_convergence,
    load_adapter,
)
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    ThroughputLogger,
)
from lit_lora.module import LossOutput
from tests.test_module import _trainer
from tests.tiny import config, grouped


class Translation(LoRALightningModule):
    """An encoder-decoder, by one of the two hooks or by both."""

    def load_base(self):
        torch.manual_seed(0)
        options = {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2, "decoder_start_token_id": 0}
        return AutoModelForSeq2SeqLM.from_config(config("T5", **options))


class TranslationLoss(Translation):
    def compute_loss(self, batch, *, accuracy=False):
        count = batch["labels"].numel()
        return LossOutput(self.model(**batch).loss * count, count, None)


def test_an_encoder_decoder_meets_no_trial_of_language_models(tmp_path):
    batch = {"input_ids": torch.arange(3, 23).view(2, 10), "labels": torch.arange(30, 44).view(2, 7)}
    module = TranslationLoss("t5", **grouped(lora=LoRAConfig(r=4), learning_rate=0.02, recompute=True))
    _trainer(tmp_path, max_steps=12).fit(module, DataLoader([batch] * 12, batch_size=None))
    assert module.path is None
    losses = module.training_metrics.losses
    assert losses[-1] < 0.9 * losses[0]
    assert module.model.generate(batch["input_ids"], max_new_tokens=3).shape[0] == 2


def test_an_encoder_decoder_without_a_loss_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*override compute_loss"):
        Translation("t5", lora=LoRAConfig(r=4)).configure_model()


class SmallVision(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(4 * 6 * 6, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        return self.classifier(self.hidden(self.features(x)).relu())


class VisionModule(LoRALightningModule):
    def load_base(self):
        torch.manual_seed(0)
        return SmallVision()

    def compute_loss(self, batch, *, accuracy=False):
        images, labels = batch
        logits = self.model(images)
        correct = (logits.argmax(-1) == labels).sum() if accuracy else None
        return LossOutput(F.cross_entropy(logits, labels, reduction="sum"), len(labels), correct)


def test_a_vision_model_is_fine_tuned_through_two_hooks(tmp_path):
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (60,))
    images = torch.randn(60, 1, 8, 8) + labels[:, None, None, None]
    module = VisionModule(
        "small-vision",
        lora=LoRAConfig(r=4, target_modules=["hidden"], modules_to_save=["classifier"]),
        optimization=OptimizationConfig(learning_rate=0.02),
    )
    module.configure_model()
    statistics = module.model.features[1].running_mean.clone()
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=20)
    callbacks = [
        GradientNormLogger(),
        MemoryProfiler(),
        ThroughputLogger(),
        GradientFlowAssertion(),
        ConvergenceAssertion(0.3, 10, on_failure="raise"),
        HFAdapterExport(),
    ]
    _trainer(tmp_path, max_steps=60, log_every_n_steps=1, callbacks=callbacks).fit(module, loader, loader)
    proving = [callback for callback in callbacks if not isinstance(callback, (ThroughputLogger, MemoryProfiler))]
    assert all(callback.verdict.passed for callback in proving), [callback.verdict for callback in proving]
    fresh = SmallVision()
    fresh.load_state_dict(VisionModule("small-vision").load_base().state_dict())
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(images), module.model.eval()(images))
    assert_loss_convergence(module.training_metrics.losses, 0.3, window=10)
    assert torch.equal(module.model.features[1].running_mean, statistics)
    assert module.training_metrics.validation[-1]["val_token_accuracy"] > 0.8
