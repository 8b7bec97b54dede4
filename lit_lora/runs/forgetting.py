"""Forgetting: what the adapter changes on general text, which no example of the training data is about.

Measured with the adapters switched on and off, so the base itself is what is compared with: nothing has to be
remembered from the start of a run, and a resumed run measures the same. The divergence is taken over the whole
vocabulary in float32. A step's loss and its random numbers stay as they are: nothing is drawn, and modules get back the
mode that they were in.

Here and not among the callbacks, since it runs the model as a batch is run in training, on data of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_lora.callbacks._support.trainer import log_details, state_key, write_json, writes_files
from lit_lora.callbacks.verdict import Check, Verdict
from lit_lora.data.batches.evaluation_batches import OrderedBatchSampler
from lit_lora.data.batches.mixture import check_no_mixture
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.prepared.dataset import Examples, check_vocabulary
from lit_lora.data.rows.data_source import Given, described, sources_of
from lit_lora.data.source_data import SourceData
from lit_lora.language_model.token_scores import token_shift
from lit_lora.module import LoRALightningModule
from lit_lora.wording import setting

FILE_NAME = "forgetting.json"


@dataclass(frozen=True)
class Shift:
    """One measurement, each number a mean over the target tokens of the sample."""

    step: int
    """Optimizer steps taken."""
    base_loss: float
    """Without the adapters, in nats."""
    loss: float
    """With them."""
    kl: float
    """Kullback-Leibler divergence of the adapted model's next-token distribution from the base's, in nats."""


class Forgetting(Check):
    """Measures loss and divergence from the base on a general sample, and holds them against bounds.

    At the start, at each validation and at the end of fit. ``<default_root_dir>/forgetting.json`` holds the verdict and
    all measurements. Without a bound it reports and passes no judgement.

    Logged when measured:

    - ``forgetting/loss``: mean loss of the adapted model on the sample, in nats per target token.
    - ``forgetting/kl``: mean divergence from the base's distributions, KL(base || adapted), in nats per target token.

    Args:
        data: the general sample, as data.train: plain text or conversations that have nothing to do with the task.
        limit: use only the first rows (of each source that has no limit of its own).
        max_kl: largest divergence at the end of fit that passes, in nats per token; None allows any.
        max_loss_rise: largest rise of the loss above the base's that passes, in nats per token; None allows any.
    """

    name = "forgetting"
    key = "forgetting"

    def __init__(
        self,
        data: Given | None = None,
        *,
        limit: int = 64,
        max_kl: float | None = None,
        max_loss_rise: float | None = None,
    ) -> None:
        super().__init__()
        if limit < 1:
            raise ValueError(f"limit must be at least 1 row, got {limit}")
        for name, bound in {"max_kl": max_kl, "max_loss_rise": max_loss_rise}.items():
            if bound is not None and not (math.isfinite(bound) and bound >= 0):
                raise ValueError(f"{name} must be a finite number of nats, 0 or more, got {bound}")
            if bound is not None and data is None:
                raise ValueError(
                    f"{name} has no effect without a sample to measure on: set {setting('forgetting.data')}"
                )
        self.limit = limit
        self.max_kl = max_kl
        self.max_loss_rise = max_loss_rise
        self.history: list[Shift] = []
        """Of the whole run, in its order."""
        self.examples: Examples | None = None
        """The sample, tokenized; None without one."""
        self._sources = None if data is None else sources_of(data, "forgetting.data")
        check_no_mixture(self._sources or [], "forgetting.data")
        self._started = False

    @property
    def data(self) -> list[str] | None:
        """Names of the sources."""
        return None if self._sources is None else [described(source.path) for source in self._sources]

    @property
    def state_key(self) -> str:
        """One for all settings: what was measured stays, whatever is allowed."""
        return state_key(self)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read and tokenize the sample, before the base is loaded.

        Raises:
            ValueError: for a module or data that there is no sample for, or a sample that cannot be used.
        """
        if stage != "fit" or self._sources is None:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
        ours = isinstance(pl_module, LoRALightningModule) and (
            type(pl_module).compute_loss is LoRALightningModule.compute_loss
        )
        if not ours or not isinstance(datamodule, SFTDataModule):
            raise ValueError(
                f"{setting('forgetting.data')} compares distributions of next tokens, of a LoRALightningModule with "
                f"its own loss on an SFTDataModule; this is {type(pl_module).__name__} on {type(datamodule).__name__}: "
                "leave it out"
            )
        settings = replace(
            datamodule.source_settings,
            format="auto",
            columns=None,
            limit=self.limit,
            train_on_prompt=False,
            train_on_turns="all",
            long_rows="truncate",
        )
        sample = SourceData(self._sources, settings, datamodule.cache_dir, None)
        self.examples = sample.examples(datamodule.tokenizer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the model knows the tokens of the sample.

        Raises:
            ValueError: if it does not.
        """
        super().on_fit_start(trainer, pl_module)
        self._started = False
        if self.examples is not None:
            assert isinstance(pl_module, LoRALightningModule)
            model: Any = pl_module.model
            check_vocabulary(self.examples, model.config.get_text_config().vocab_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what the run begins with."""
        self._started = True
        self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure beside the validation data."""
        if self._started and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._measure(trainer, pl_module)

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Verdict:
        """Measure once more, and hold it against the bounds."""
        self._measure(trainer, pl_module)
        verdict = self._judged()
        if writes_files(trainer):
            content = {**verdict._asdict(), "max_kl": self.max_kl, "max_loss_rise": self.max_loss_rise}
            content |= {"data": self.data, "num_tokens": self._num_tokens, "history": [*map(asdict, self.history)]}
            try:
                write_json(Path(trainer.default_root_dir) / FILE_NAME, content)
            except OSError as error:  # the verdict itself is in verdict.json, which is an error if it cannot be written
                rank_zero_warn(f"What was measured of forgetting was not written: {error}")
        if verdict.passed is False:
            rank_zero_warn(f"{self.name}: {verdict.detail}")
        return verdict

    def judge_early(self, trainer: L.Trainer, exception: BaseException) -> Verdict:
        """Of a run that did not come to its end nothing is said."""
        return Verdict(self.name, None, f"ended early after step {trainer.global_step}", self._is_asked)

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, as plain types."""
        return {"history": [asdict(shift) for shift in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.history = [Shift(**shift) for shift in state_dict["history"]]

    @property
    def _is_asked(self) -> bool:
        return self.max_kl is not None or self.max_loss_rise is not None

    @property
    def _num_tokens(self) -> int:
        return 0 if self.examples is None else self.examples.num_supervised

    def _judged(self) -> Verdict:
        if not self.history or not self._num_tokens:
            return Verdict(self.name, None, "no token of a sample to measure on", self._is_asked)
        now, rise = self.history[-1], self.history[-1].loss - self.history[-1].base_loss
        detail = (
            f"KL to the base {now.kl:.4f} nats/token, loss {now.base_loss:.3f} -> {now.loss:.3f} on "
            f"{self._num_tokens:,} tokens of {', '.join(self.data or [])}"
        )
        if not all(map(math.isfinite, (now.kl, now.loss))):
            return Verdict(self.name, False, f"not finite: {detail}")
        bounds = {"KL": (now.kl, self.max_kl), "a rise of": (rise, self.max_loss_rise)}
        allowed = [f"{what} {bound:g}" for what, (_, bound) in bounds.items() if bound is not None]
        detail += f", allowed {' and '.join(allowed)}" if allowed else "; no bound set"
        if any(bound is not None and value > bound for value, bound in bounds.values()):
            advice = "lower the learning rate or r, take fewer steps, or mix general data into the training data"
            return Verdict(self.name, False, f"{detail}; {advice}")
        return Verdict(self.name, True if allowed else None, detail, bool(allowed))

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Add a measurement, unless there is one of this step; all processes take part."""
        if self.examples is None or (self.history and self.history[-1].step == trainer.global_step):
            return
        assert isinstance(module, LoRALightningModule)
        base_loss, loss, kl, weight = self._sums(trainer, module)
        if not weight:
            return
        self.history.append(Shift(trainer.global_step, base_loss / weight, loss / weight, kl / weight))
        now = self.history[-1]
        logged = {"forgetting/loss": now.loss, "forgetting/kl": now.kl}
        if trainer.validating and not trainer.barebones:  # where Lightning takes it, for whoever monitors it
            module.log_dict(logged, rank_zero_only=True, batch_size=1)
        else:
            log_details(trainer, max(1, trainer.global_step), logged)
        if len(self.history) == 1:
            rank_zero_info(f"forgetting: the base's loss on {self._num_tokens:,} general tokens is {now.base_loss:.3f}")

    @torch.no_grad()
    def _sums(self, trainer: L.Trainer, module: LoRALightningModule) -> list[float]:
        """Over the target tokens, by their weight: loss without and with adapters, divergence, and the weight."""
        assert self.examples is not None
        assert module.path is not None
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        collate = collate_packed if data.packing else collate_padded
        batches = OrderedBatchSampler(
            self.examples.lengths,
            data.batch_settings,
            self.examples.starts,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        sums = torch.zeros(4, dtype=torch.float64, device=module.device)
        with _evaluating(module), trainer.precision_plugin.forward_context():
            for numbers in batches:
                examples: Any = collate([self.examples[number] for number in numbers])
                batch: Any = trainer.strategy.batch_to_device(examples)
                shift = token_shift(module.model, batch, module.path)  # type: ignore[arg-type]
                weights = batch.get("target_weights", torch.ones_like(shift.kl_S)).double()
                columns = torch.stack([shift.base_nll_S, shift.nll_S, shift.kl_S, torch.ones_like(shift.kl_S)])
                sums += columns.double() @ weights
        return torch.as_tensor(trainer.strategy.reduce(sums, reduce_op="sum")).tolist()


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each part has its own back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
