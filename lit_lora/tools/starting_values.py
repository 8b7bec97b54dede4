"""What a first run starts with, and the evidence for it: the values that ``lit-lora init`` writes.

Learning rates and batch sizes: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025) and the formula of its
authors' hyper-parameter guide (Tinker cookbook, ``get_lr``), fitted to Llama and Qwen models. Ranks: what people use.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lit_lora.cli.commented_config import Choice

if TYPE_CHECKING:
    from lit_lora.data.look.report import DataReport

FULL_FINE_TUNING_RATE, OF_LORA = 5e-5, 10
"""At a width of 2000, and how many times as large the best rate of LoRA is."""
WIDTH = 2000
EXPONENTS = {"qwen": 0.0775}
"""How fast the best rate falls with the width, by the beginning of a model type."""
USUAL_EXPONENT = 0.781
"""Of Llama; taken for all that were not measured."""

EXAMPLES_PER_STEP = 16
STEPS_PER_EPOCH = 8
"""At the least, where the data is small."""
FEW_EXAMPLES = 10_000
EPOCHS_OF_FEW = 3
LEAST_TO_VALIDATE = 40
VALIDATION_FRACTION = 0.05


def learning_rate(hidden_size: int, model_type: str) -> float:
    """The rate to start with, to two digits.

    Args:
        hidden_size: width of the model.
        model_type: as in its config.
    """
    exponent = next((power for kind, power in EXPONENTS.items() if model_type.startswith(kind)), USUAL_EXPONENT)
    return float(f"{FULL_FINE_TUNING_RATE * OF_LORA * (WIDTH / hidden_size) ** exponent:.1e}")


def is_open(key: str, given: Collection[str]) -> bool:
    """Whether a setting was left to us: neither it nor a group that it is in was given."""
    return not any(key == other or key.startswith(f"{other}.") for other in given)


def adapter_choices(config: Any, given: Collection[str]) -> list[Choice]:
    """Which layers, of what rank, at what rate.

    Args:
        config: the parsed settings of a ``fit``.
        given: keys that were chosen already.
    """
    from lit_lora.base.load import load_config

    model = config.model
    base = load_config(model.base, revision=model.revision, trust_remote_code=model.trust_remote_code).get_text_config()
    rate = learning_rate(base.hidden_size, base.model_type)
    kind = "Qwen" if base.model_type.startswith("qwen") else "Llama"
    choices = [
        Choice(
            "model.lora.target_modules",
            "all-linear",
            "every linear layer: adapters on attention alone learned less than those on MLPs or on both, at any rank "
            "(LoRA Without Regret, 2025)",
        ),
        Choice(
            "model.lora.r",
            16,
            "raise it if the training loss stops falling too early, lower it for a smaller adapter; what it costs: "
            "lit-lora estimate",
        ),
        Choice(
            "model.lora.lora_alpha", 32, "leave it as it is when r changes: then the best learning rate hardly moves"
        ),
        Choice(
            "model.optimization.learning_rate",
            rate,
            f"ten times that of full fine-tuning, and nearly independent of r: 5e-5 * 10 * (2000 / "
            f"{base.hidden_size})^p, with p fitted to {kind} models "
            "(LoRA Without Regret). If anything is tuned, tune this",
        ),
    ]
    if model.adapter is not None:  # which brings its own layers and rank
        choices = choices[3:]
    if model.get("optimizer") is not None:
        choices = [choice for choice in choices if choice.key != "model.optimization.learning_rate"]
    return [choice for choice in choices if is_open(choice.key, given)]


def data_choices(report: DataReport, given: Collection[str]) -> list[Choice]:
    """How rows are cut and put into micro-batches.

    Args:
        report: of a look at the data.
        given: keys that were chosen already.
    """
    batched = not {"data.batch_size", "data.max_tokens_per_batch"} & set(given)
    suggested = [
        entry for entry in report.suggested if batched or entry.key not in ("batch_size", "max_tokens_per_batch")
    ]
    choices = [Choice(f"data.{entry.key}", entry.value, entry.reason) for entry in suggested]
    num_examples = sum(source.num_examples for source in report.sources)
    if num_examples >= LEAST_TO_VALIDATE and not {"data.validation", "data.validation_fraction"} & set(given):
        reason = "set aside to measure on, before training and after; the best adapter by it is kept beside the last"
        choices.append(Choice("data.validation_fraction", VALIDATION_FRACTION, reason))
    return [choice for choice in choices if is_open(choice.key, given)]


def accumulation(num_examples: int, num_batches: int) -> int:
    """Micro-batches of a step: of sixteen examples, or fewer where the data is small.

    Args:
        num_examples: in an epoch.
        num_batches: micro-batches in an epoch.
    """
    wanted = max(1, min(EXAMPLES_PER_STEP, num_examples // STEPS_PER_EPOCH))
    return max(1, round(wanted * num_batches / num_examples))


def run_choices(
    report: DataReport,
    given: Collection[str],
    num_examples: int,
    num_batches: int,
    accumulated: int,
    *,
    budget: str | None,
    device: str,
) -> list[Choice]:
    """How long, in steps of how many examples, where to, and within what memory.

    Args:
        report: of a look at the data.
        given: keys that were chosen already.
        num_examples: in an epoch.
        num_batches: micro-batches in an epoch.
        accumulated: micro-batches of a step.
        budget: memory that was asked for; None if none was.
        device: "cpu" or "cuda".
    """
    from lit_lora.config import parse_bytes

    steps = max(1, num_batches // accumulated)
    epochs = EPOCHS_OF_FEW if num_examples < FEW_EXAMPLES else 1
    choices = []
    if not {"trainer.max_steps", "trainer.max_epochs", "trainer.max_time"} & set(given):
        reason = f"about {epochs * steps:,} steps in all"
        choices.append(Choice("trainer.max_epochs", epochs, reason))
    choices += [
        Choice(
            "trainer.accumulate_grad_batches",
            accumulated,
            f"a step has about {accumulated * num_examples / num_batches:.0f} examples: LoRA loses more than full "
            "fine-tuning does from batches above 32 (LoRA Without Regret)",
        ),
        Choice("trainer.gradient_clip_val", 1.0, "one odd batch then moves the adapters no further than others do"),
        Choice("trainer.default_root_dir", f"runs/{_stem(report)}", "the folder of the run; a second run takes -2"),
    ]
    if not any(key.startswith("convergence") for key in given):
        reason = "how far the loss can fall is not known before: that it falls at all is checked"
        choices.append(Choice("convergence.min_decrease", 0.0, reason))
    if budget is not None:
        mib = parse_bytes(budget) // 2**20
        choices.append(Choice("memory.budget_mib", mib, "the verdict of the run says whether it stayed within"))
        if device == "cpu":
            choices.append(Choice("memory.baseline", True, "above the interpreter and its libraries"))
    return [choice for choice in choices if is_open(choice.key, given)]


def _stem(report: DataReport) -> str:
    name = PurePath(report.sources[0].name.split("@")[0].split(":")[0]).name.split(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-") or "run"
