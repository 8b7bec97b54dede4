"""Targets that count more or less: the loss of a step is their weighted mean, whatever the step is made of."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_lora import LoRAConfig, LoRALightningModule
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels.linear_cross_entropy import linear_cross_entropy_with_accuracy
from lit_lora.training.step_metrics import EvaluationMeans, LossOutput, StepWindow
from tests.tiny import config, examples, grouped

LENGTHS = (7, 12, 5, 9)
WEIGHTS = (0.25, None, 2.0, 0.001)


def data(weights=WEIGHTS, lengths=LENGTHS):
    made = []
    for number, ((ids, mask), weight) in enumerate(zip(examples(lengths), weights, strict=True)):
        supervised = np.array(mask)
        given = None if weight is None else np.where(supervised, np.float32(weight), np.float32(0))
        made.append(TokenizedExample(number, np.array(ids, np.int32), supervised, given))
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config("Llama", initializer_range=0.2, vocab_size=260).save_pretrained(folder)
    return f"random:{folder}"


def module_of(base, **options):
    torch.manual_seed(1)
    settings = {"lora": LoRAConfig(r=4), "learning_rate": 0.01, "warmup_ratio": 0.0, "lr_schedule": "constant"}
    module = LoRALightningModule(base, **grouped(**settings, **options))
    module.configure_model()
    return module


def fit(module, folder, made, *, batch_size=4, collate=collate_packed, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "max_steps": 2, "default_root_dir": folder, **quiet, **options}
    L.Trainer(**options).fit(module, DataLoader(made, batch_size=batch_size, collate_fn=collate))
    return {name: p.detach().clone() for name, p in module.trainable_parameters().items()}


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("vocab_size", [50, 8193])
def test_the_kernel_weighs_value_and_gradient(vocab_size, weight_grad):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 16, generator=generator, requires_grad=True)
    head = torch.randn(vocab_size, 16, generator=generator, requires_grad=weight_grad)
    labels = torch.randint(vocab_size, (13,), generator=generator)
    labels[3] = -100
    weights = torch.rand(13, generator=generator)
    out = linear_cross_entropy_with_accuracy(hidden, head, labels, weights=weights, chunk_size=4)
    tensors = [hidden, head] if weight_grad else [hidden]
    got = torch.autograd.grad(out.nll_sum, tensors)
    expected = (F.cross_entropy(hidden @ head.T, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(out.nll_sum, expected.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(got, torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert out.num_correct == linear_cross_entropy_with_accuracy(hidden, head, labels).num_correct


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
@pytest.mark.parametrize("chunked_loss", [True, False])
def test_the_loss_is_the_weighted_mean_on_every_path(base, collate, chunked_loss):
    module = module_of(base, chunked_loss=chunked_loss)
    output = module.compute_loss(collate(data()))
    alone = [module.compute_loss(collate([example])) for example in data(weights=[None] * 4)]
    factors = [1.0 if weight is None else weight for weight in WEIGHTS]
    expected = sum(factor * float(one.loss_sum.detach()) for factor, one in zip(factors, alone, strict=True))
    assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-4)
    weight = sum(factor * one.num_targets for factor, one in zip(factors, alone, strict=True))
    assert float(output.target_weight) == pytest.approx(weight, rel=1e-6)
    assert output.num_targets == sum(one.num_targets for one in alone)


def test_accumulating_equals_one_batch(base, tmp_path):
    whole = module_of(base)
    expected = fit(whole, tmp_path, data())
    for batch_size in (1, 2):
        parts = module_of(base)
        got = fit(parts, tmp_path, data(), batch_size=batch_size, accumulate_grad_batches=4 // batch_size)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
        for a, b in zip(whole.training_metrics.steps, parts.training_metrics.steps, strict=True):
            assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)
            assert a.num_target_tokens == b.num_target_tokens


@pytest.mark.parametrize("weight", [1.0, 0.01, 3.0])
def test_one_weight_for_all_changes_nothing(base, tmp_path, weight):
    plain = fit(module_of(base), tmp_path, data(weights=[None] * 4))
    weighted = fit(module_of(base), tmp_path, data(weights=[weight] * 4))
    for name in plain:
        torch.testing.assert_close(weighted[name], plain[name], rtol=1e-4, atol=1e-6)


def test_batches_without_weights_have_no_key_for_them():
    assert "target_weights" not in collate_packed(data(weights=[None] * 4))
    assert collate_packed(data())["target_weights"].dtype == torch.float32


def test_evaluation_means_are_weighted():
    means = EvaluationMeans()
    means.add(LossOutput(torch.tensor(6.0), 3))
    means.add(LossOutput(torch.tensor(1.0), 4, target_weight=torch.tensor(0.5)))
    assert float(means.results("val")["val_loss"]) == pytest.approx(7 / 3.5)


def test_a_window_of_a_checkpoint_without_weights_counts_its_targets():
    window = StepWindow()
    window.add(LossOutput(torch.tensor(6.0), 3))
    state = {name: value for name, value in window.state_dict().items() if name != "target_weight"}
    resumed = StepWindow()
    resumed.add_state(state)
    resumed.add(LossOutput(torch.tensor(1.0), 4, target_weight=torch.tensor(0.5)))
    assert resumed.totals(torch.device("cpu")).tolist() == [7.0, 7.0, 7.0, 3.5]
