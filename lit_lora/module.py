"""The LightningModule: adapters on a frozen base, a loss that counts tokens right, checkpoints of adapters only.

For a causal language model it is complete. For any other ``nn.Module`` override two hooks: :meth:`load_base` (which
base) and :meth:`compute_loss` (which loss).

The loss of an optimizer step is the sum over its supervised tokens divided by their number, over all micro-batches and
all ranks, so that four batches of one equal one batch of four however long the examples are. Lightning divides by the
number of micro-batches instead; :meth:`optimizer_step` puts that right before anyone reads the gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_lora import causal_lm, schedule
from lit_lora.activation_checkpointing import checkpoint_layers
from lit_lora.adapters.inject import InjectionReport, inject_lora
from lit_lora.checkpoint import base_fingerprint, describe_mismatch, read_checkpoint, rng_state, set_rng_state
from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.metrics import StepMetrics, TrainingMetrics
from lit_lora.models import load_base_model, load_tokenizer

_STATE = "lit_lora"
_LOSS_DIVISOR = 1024.0  # any constant does: it keeps a summed loss in range for fp16 and is taken out again
_STRUCTURE = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)


class LossOutput(NamedTuple):
    """The loss of one micro-batch, unnormalised."""

    loss_sum: Tensor
    """Sum over supervised targets (tokens, images, ...), scalar."""
    num_targets: int
    """How many targets that sum is over, in this micro-batch on this rank."""
    num_correct: Tensor | None = None
    """How many of them were predicted right; None if not counted."""
    num_tokens: int | None = None
    """Real (unpadded) tokens in the micro-batch; the number of targets if None."""


class _Window:
    """Sums over the micro-batches of one optimizer step, on this rank."""

    def __init__(self) -> None:
        self.loss_sum: Tensor | float = 0.0
        self.num_targets = 0
        self.num_tokens = 0
        self.num_batches = 0

    def add(self, output: LossOutput) -> None:
        self.loss_sum = self.loss_sum + output.loss_sum.detach().float()
        self.num_targets += output.num_targets
        self.num_tokens += output.num_targets if output.num_tokens is None else output.num_tokens
        self.num_batches += 1

    def totals(self, device: torch.device) -> Tensor:
        counts = torch.tensor([self.num_targets, self.num_tokens], dtype=torch.float64)
        loss_sum = torch.as_tensor(self.loss_sum, dtype=torch.float64, device=device)
        return torch.cat([loss_sum.reshape(1), counts.to(device, non_blocking=True)])

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "loss_sum": float(self.loss_sum)}


class LoRALightningModule(L.LightningModule):
    """LoRA or QLoRA fine-tuning of a frozen base model."""

    def __init__(
        self,
        base: str = "smollm2-135m-instruct",
        *,
        lora: LoRAConfig | dict[str, Any] = LoRAConfig(),  # noqa: B008 (frozen)
        quantization: QuantizationConfig | dict[str, Any] | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        lr_schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_ratio: float = 0.03,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        packing: bool = True,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 128,
    ) -> None:
        """Store the settings; the model is built in :meth:`configure_model`.

        Args:
            base: Hub id, folder, GGUF file, a name that ``lit-lora fetch`` knows, or random:ARCHITECTURE.
            lora: which layers get adapters, of what rank.
            quantization: how to quantize the frozen base; None for full precision.
            dtype: of the base's weights; auto is bfloat16 on CUDA and float32 on a CPU.
            revision: branch, tag or commit of the base on the Hub.
            trust_remote_code: run code that comes with the base.
            learning_rate: peak learning rate of the built-in AdamW.
            weight_decay: of the built-in AdamW.
            lr_schedule: what follows the warm-up, per optimizer step.
            warmup_ratio: share of all steps over which the learning rate rises.
            optimizer: replaces the built-in AdamW; gets adapter parameters only.
            lr_scheduler: replaces the built-in schedule; stepped after every optimizer step.
            packing: run examples one after another without padding, where that is exact for the model.
            gradient_checkpointing: recompute each layer in the backward pass: less memory, more time.
            max_new_tokens: longest generation of ``predict``, in tokens.
        """
        super().__init__()
        self.base = base
        self.lora = LoRAConfig(**lora) if isinstance(lora, Mapping) else lora
        self.quantization = QuantizationConfig(**quantization) if isinstance(quantization, Mapping) else quantization
        self.dtype_name = dtype
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.warmup_ratio = warmup_ratio
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.packing = packing
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {warmup_ratio}")
        if optimizer is not None and weight_decay:
            raise ValueError("weight_decay has no effect on an optimizer of your own: set it there")

        self.strict_loading = False  # the base is not in checkpoints; on_load_checkpoint checks the adapter's keys
        self.model: nn.Module | None = None
        self.injection_report: InjectionReport | None = None
        self.path: causal_lm.Path | None = None
        self.training_metrics = TrainingMetrics()
        self._window = _Window()
        self._resume_state: dict[str, Any] | None = None
        self._step_ended_s: float | None = None
        self._norms: Tensor | None = None
        self._pending_steps: list[tuple[dict[str, Any], Tensor]] = []
        self._means = nn.ModuleDict()

    # ------------------------------------------------------------------ hooks to override for other models

    def load_base(self) -> nn.Module:
        """Load the base model. Override for a model that is no causal language model."""
        return load_base_model(
            self.base,
            dtype=self.dtype_name,
            quantization=self.quantization,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        """Loss of one micro-batch, summed over its targets. Override for a model that is no causal language model.

        Args:
            batch: what the dataloader gives.
            accuracy: also count correct predictions (validation and test).
        """
        assert self.path is not None, "configure_model has not run"
        batch = causal_lm.with_targets(batch)
        nll_sum, num_correct = causal_lm.language_model_loss(self.model, batch, self.path, accuracy=accuracy)  # type: ignore[arg-type]
        return LossOutput(nll_sum, batch["target_ids"].numel(), num_correct, batch.get("num_tokens"))

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Load the base, inject the adapters, freeze everything else. Does nothing the second time."""
        if self.model is not None:
            return
        model = self.load_base()
        self.injection_report = inject_lora(model, self.lora)
        model.train()
        if self._is_language_model:
            self.path = causal_lm.choose_path(model, packing=self.packing)  # type: ignore[arg-type]
            rank_zero_info(f"Forward path: {self.path}")
        if self.gradient_checkpointing:
            checkpoint_layers(model)
        self.model = model
        _keep_batch_norm_frozen(model)

    @property
    def _is_language_model(self) -> bool:
        return type(self).compute_loss is LoRALightningModule.compute_loss

    def train(self, mode: bool = True) -> LoRALightningModule:
        """Set the mode; batch norms of the frozen base stay in evaluation, so that their statistics do not move."""
        super().train(mode)
        if self.model is not None:
            _keep_batch_norm_frozen(self.model)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's own forward."""
        assert self.model is not None, "configure_model has not run"
        return self.model(*args, **kwargs)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name, in the order in which the optimizer holds them."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    # ------------------------------------------------------------------ optimization

    def configure_optimizers(self) -> dict[str, Any]:
        """Adapter parameters and a schedule that steps with the optimizer."""
        parameters = list(self.trainable_parameters().values())
        if self.optimizer_callable is not None:
            optimizer = self.optimizer_callable(parameters)
        else:
            # A fused optimizer under a loss scaler would unscale by itself, after norms are logged and clipped.
            fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
            optimizer = torch.optim.AdamW(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused
            )
        if self.lr_scheduler_callable is not None:
            scheduler = self.lr_scheduler_callable(optimizer)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ValueError(
                    "lr_scheduler ReduceLROnPlateau needs a monitor: subclass and override configure_optimizers"
                )
        else:
            scheduler = schedule.build(
                optimizer, self.lr_schedule, num_steps=self._num_steps(), warmup_ratio=self.warmup_ratio
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> int | None:
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, up to a constant factor; see :meth:`optimizer_step`."""
        output = self.compute_loss(batch)
        self._window.add(output)
        return output.loss_sum / _LOSS_DIVISOR

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One optimizer step on gradients that are normalised by the supervised tokens of the whole step.

        After the closure's backward pass a gradient is ``sum over micro-batches and ranks of nll_sum / (C * N * W)``
        for the constant C, N micro-batches and W ranks, so it is multiplied by ``C * N * W / supervised tokens``.
        That happens before callbacks see, clip or log gradients, and before a loss scaler unscales them.
        """

        def closure() -> Any:
            loss = optimizer_closure()
            self._normalise_gradients()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self._finish_step(optimizer)

    def _normalise_gradients(self) -> None:
        totals = self.trainer.strategy.reduce(self._window.totals(self.device), reduce_op="sum")
        assert isinstance(totals, Tensor)
        self._totals = totals
        factor = _LOSS_DIVISOR * self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [p.grad for p in self.trainable_parameters().values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, (factor / totals[1].clamp(min=1)).to(gradients[0].dtype))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Take the norms of the unclipped gradients and of the parameters, and log the step's loss."""
        parameters = list(self.trainable_parameters().values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._norms = torch.stack([_norm(gradients, self.device), _norm([p.detach() for p in parameters], self.device)])
        loss = (self._totals[0] / self._totals[1].clamp(min=1)).float()
        self.log("train_loss", loss, prog_bar=True, rank_zero_only=True)

    def _finish_step(self, optimizer: Any) -> None:
        now = time.perf_counter()
        assert self._norms is not None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        known = {
            "step": self.trainer.global_step + 1,
            "loss_scale": scaler.get_scale() if scaler is not None else 1.0,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "step_time_s": now - self._step_ended_s if self._step_ended_s is not None else 0.0,
        }
        self._pending_steps.append((known, torch.cat([self._totals, self._norms.double()])))
        self._step_ended_s = now
        self._window = _Window()
        # Reading a value makes the host wait for a CUDA device, so there it is done on logging steps only.
        if self.device.type == "cpu" or len(self._pending_steps) >= self.trainer.log_every_n_steps:
            self.flush_metrics()

    def flush_metrics(self) -> TrainingMetrics:
        """Bring ``training_metrics`` up to the last step, and return it. Waits for the device."""
        pending, self._pending_steps = self._pending_steps, []
        if pending:
            for (known, _), values in zip(pending, torch.stack([v for _, v in pending]).tolist(), strict=True):
                loss_sum, num_targets, num_tokens, grad_norm, param_norm = values
                step = StepMetrics(
                    loss=loss_sum / max(num_targets, 1),
                    grad_norm=grad_norm,
                    param_norm=param_norm,
                    num_tokens=int(num_tokens),
                    num_target_tokens=int(num_targets),
                    **known,
                )
                self.training_metrics.steps.append(step)
        return self.training_metrics

    # ------------------------------------------------------------------ validation, test, prediction

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        """Start new means."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Start new means."""
        self._start_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` (nats per token), ``val_perplexity`` and ``val_token_accuracy``."""
        results = self._finish_evaluation("val")
        whole = not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == math.inf
        if whole and results:
            self.flush_metrics().validation.append({"step": self.trainer.global_step, **results})
        self._step_ended_s = None if self._step_ended_s is None else time.perf_counter()

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss``, ``test_perplexity`` and ``test_token_accuracy``."""
        self._finish_evaluation("test")

    def _start_evaluation(self) -> None:
        self._means = nn.ModuleDict({"loss": MeanMetric(), "token_accuracy": MeanMetric()}).to(self.device)

    def _evaluate(self, batch: Any) -> None:
        output = self.compute_loss(batch, accuracy=True)
        if not output.num_targets:
            return
        self._means["loss"].update(output.loss_sum.detach() / output.num_targets, weight=output.num_targets)
        if output.num_correct is not None:
            self._means["token_accuracy"].update(output.num_correct / output.num_targets, weight=output.num_targets)

    def _finish_evaluation(self, prefix: str) -> dict[str, float]:
        counted = {name: metric for name, metric in self._means.items() if metric.update_called}  # type: ignore[operator]
        results = {f"{prefix}_{name}": metric.compute() for name, metric in counted.items()}  # type: ignore[operator]
        if f"{prefix}_loss" in results:
            results[f"{prefix}_perplexity"] = results[f"{prefix}_loss"].exp()
        self.log_dict(results, prog_bar=True, rank_zero_only=True)
        return {name: value.item() for name, value in results.items()}

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Generate from a prompt, greedily.

        Args:
            batch: ``prompt_ids``, ``(1, L)``, and where there is one, ``reference``.
            batch_idx: not used.

        Returns:
            A list of one dict: ``prompt``, ``completion``, ``reference``.
        """
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        prompt_ids = batch["prompt_ids"]
        output_ids = self.model.generate(  # type: ignore[union-attr, operator]
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        prompt = tokenizer.decode(prompt_ids[0], skip_special_tokens=True)
        completion = tokenizer.decode(output_ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
        return [{"prompt": prompt, "completion": completion, "reference": batch.get("reference")}]

    def load_tokenizer(self) -> Any:
        """The tokenizer that belongs to the base."""
        return load_tokenizer(self.base, revision=self.revision, trust_remote_code=self.trust_remote_code)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trainable parameters only: the base is loaded from where it came from."""
        trainable = self.trainable_parameters().keys()
        prefix = kwargs.get("prefix", "")
        full = super().state_dict(*args, **kwargs)
        return {name: value for name, value in full.items() if name.removeprefix(prefix) in trainable}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load adapters; that the base is not among them is no finding."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trainable = self.trainable_parameters().keys()
        return type(result)([name for name in result.missing_keys if name in trainable], result.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact continuation needs, and which base and structure the adapters belong to."""
        assert self.model is not None, "configure_model has not run"
        partial = None
        if self._window.num_batches:
            gradients = {n: p.grad.cpu() for n, p in self.trainable_parameters().items() if p.grad is not None}
            partial = {"sums": self._window.state_dict(), "gradients": gradients}
        ranks = [{"rng": rng_state(), "window": partial}]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, ranks[0])
            ranks = gathered
        checkpoint[_STATE] = {
            "base": self.base,
            "base_fingerprint": base_fingerprint(self.model),
            "settings": self._settings(),
            "ranks": ranks,
            "metrics": self.flush_metrics().state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this base and these adapters; keep the rest for the start of training.

        Raises:
            ValueError: naming what differs.
        """
        assert self.model is not None, "configure_model has not run"
        state = checkpoint.get(_STATE)
        if state is None:
            raise ValueError(
                "this checkpoint was not written by a LoRALightningModule: it holds no base and no adapters"
            )
        settings = self._settings()
        saved_lora, lora = ({k: s["lora"][k] for k in _STRUCTURE} for s in (state["settings"], settings))
        differences = describe_mismatch(saved_lora, lora)
        differences += describe_mismatch(
            {"quantization": state["settings"]["quantization"]}, {"quantization": settings["quantization"]}
        )
        if differences:
            raise ValueError(
                "the checkpoint's adapters differ from the configured ones: "
                + "; ".join(differences)
                + ". Set them as saved to resume, or start a new run"
            )
        if state["base_fingerprint"] != base_fingerprint(self.model):
            raise ValueError(
                f"the checkpoint belongs to another base: it was trained on {state['base']!r}, this is {self.base!r} "
                "with other weights. Set model.base to the base that it was trained on"
            )
        _check_keys(checkpoint["state_dict"], self.trainable_parameters())
        self._resume_state = state
        self.training_metrics = TrainingMetrics.from_state_dict(state["metrics"])

    def on_train_start(self) -> None:
        """Continue a resumed run where it was: random state, and the gradients of an unfinished window."""
        self._step_ended_s = time.perf_counter()
        state, self._resume_state = self._resume_state, None
        if state is None:
            return
        rank, ranks = self.global_rank, state["ranks"]
        if len(ranks) == self.trainer.world_size:
            set_rng_state(ranks[rank]["rng"])
            self._restore_window([ranks[rank]["window"]])
        elif rank == 0:  # another number of processes: all that was summed goes to one of them
            self._restore_window([entry["window"] for entry in ranks])

    def _restore_window(self, windows: list[dict[str, Any] | None]) -> None:
        parameters = self.trainable_parameters()
        for window in filter(None, windows):
            for name, value in window["sums"].items():
                setattr(self._window, name, getattr(self._window, name) + value)
            for name, gradient in window["gradients"].items():
                gradient = gradient.to(parameters[name].device)
                previous = parameters[name].grad
                parameters[name].grad = gradient if previous is None else previous + gradient

    def _settings(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "lora": asdict(self.lora),
            "quantization": asdict(self.quantization) if self.quantization is not None else None,
            "dtype": self.dtype_name,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "lr_schedule": self.lr_schedule,
            "warmup_ratio": self.warmup_ratio,
            "packing": self.packing,
            "gradient_checkpointing": self.gradient_checkpointing,
            "max_new_tokens": self.max_new_tokens,
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> LoRALightningModule:  # type: ignore[override]
        """Build the module as it was and load the adapters; ``kwargs`` override saved settings (``base``, for one).

        Lightning's own key for hyper-parameters is not used: its command line would let the file override options.
        """
        saved = read_checkpoint(checkpoint_path).get(_STATE, {}).get("settings", {})
        trust = kwargs.pop("trust_remote_code", False)  # never taken from a file
        return super().load_from_checkpoint(checkpoint_path, **{**saved, **kwargs, "trust_remote_code": trust})


def _keep_batch_norm_frozen(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(tensors)]))


def _check_keys(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    problems = [f"missing {name}" for name in parameters if name not in saved]
    problems += [f"unexpected {name}" for name in saved if name not in parameters]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in saved and saved[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("the checkpoint does not fit the adapters: " + "; ".join(problems[:5]) + more)
