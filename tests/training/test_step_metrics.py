"""A step without a target has no loss: not 0, and nothing that a check would take for one."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lit_lora import LoRAConfig, LoRALightningModule, TrainingMetrics
from lit_lora.callbacks import ConvergenceAssertion, GradientNormLogger
from lit_lora.training.step_metrics import EvaluationMeans, LossOutput
from tests.tiny import config, grouped


def batches(num_with: int, num_without: int) -> DataLoader:
    """Batches with targets, then some whose labels are all masked."""
    torch.manual_seed(0)
    made = []
    for number in range(num_with + num_without):
        ids = torch.randint(3, 100, (2, 9))
        labels = ids if number < num_with else torch.full_like(ids, -100)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return DataLoader(made, batch_size=None, shuffle=False)


@pytest.fixture
def fit(tmp_path):
    config("Llama").save_pretrained(tmp_path / "base")

    def run(loader, *callbacks):
        module = LoRALightningModule(f"random:{tmp_path / 'base'}", **grouped(lora=LoRAConfig(r=4), learning_rate=0.01))
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=1, log_every_n_steps=1, callbacks=list(callbacks), enable_checkpointing=False,
            default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(module, loader)
        return module

    return run


def strict(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def test_steps_without_a_target_are_recorded_without_a_loss_and_not_judged(fit, tmp_path):
    convergence = ConvergenceAssertion(-1.0, 2)
    module = fit(batches(4, 3), convergence, GradientNormLogger())
    metrics = module.flush_metrics()
    assert [step.num_target_tokens for step in metrics.steps] == [16] * 4 + [0] * 3
    assert len(metrics.losses) == 4
    assert all(math.isnan(step.loss) for step in metrics.steps[4:])
    assert convergence.losses == pytest.approx(metrics.losses)
    assert convergence.verdict.passed
    metrics.save(tmp_path / "metrics.jsonl")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)
    assert TrainingMetrics.load(tmp_path / "metrics.jsonl").losses == metrics.losses


def test_a_run_without_any_target_is_not_judged(fit):
    convergence = ConvergenceAssertion(0.3, 2)
    fit(batches(0, 4), convergence)
    assert convergence.verdict.passed is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: step.update(mood=1), "a step's metrics .* unknown mood"),
        (lambda step: step.pop("loss"), "a step's metrics .* missing loss"),
    ],
)
def test_metrics_of_another_version_are_named_as_such(fit, change, message):
    step = json.loads(fit(batches(1, 0)).flush_metrics().to_jsonl())
    change(step)
    with pytest.raises(ValueError, match=message):
        TrainingMetrics.from_jsonl(json.dumps(step) + "\n")


def test_a_rank_with_nothing_to_evaluate_takes_part_in_what_the_others_wait_for():
    """Else two processes that share one validation example wait for each other for ever."""
    shares = {
        "some": LossOutput(torch.tensor(6.0), 3, torch.tensor(1)),
        "nothing": LossOutput(torch.tensor(0.0), 0, torch.tensor(0)),
    }
    means = {}
    for name, output in shares.items():
        means[name] = EvaluationMeans()
        means[name].add(output)
    called = {name: [m.update_called for m in mean.children() if isinstance(m, Metric)] for name, mean in means.items()}
    assert called["nothing"] == called["some"]
    assert all(called["some"])
    assert means["nothing"].results("val") == {}
    means["some"].add(shares["nothing"])
    assert means["some"].results("val")["val_loss"] == 2.0
    assert means["some"].results("val")["val_token_accuracy"] == pytest.approx(1 / 3)
