"""The LightningModule: adapters on a frozen base, a loss that counts tokens right, checkpoints of adapters only.

For a causal language model it is complete. For any other ``nn.Module`` override two hooks: :meth:`load_base` (which
base) and :meth:`compute_loss` (which loss).

The loss of an optimizer step is the sum over its supervised tokens divided by their number, over all micro-batches and
all ranks, so that four batches of one equal one batch of four however long the examples are. Lightning divides by the
number of micro-batches instead; :meth:`optimizer_step` puts that right before anyone reads the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_lora import causal_lm, compilation, liger_kernels, optimization, training_state
from lit_lora.activation_budget import ActivationBudget
from lit_lora.activation_checkpointing import checkpoint_layers
from lit_lora.adapters.inject import InjectionReport, inject_lora
from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.amounts import parse_bytes
from lit_lora.checkpoint import read_checkpoint
from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.frozen_statistics import keep_batch_norm_frozen
from lit_lora.gated_mlp import recompute_gated_mlps
from lit_lora.metrics import TrainingMetrics
from lit_lora.models import load_base_model
from lit_lora.prediction import answer
from lit_lora.step_metrics import EvaluationMeans, LossOutput, StepRecorder
from lit_lora.trainer_settings import refuse_sharding
from lit_lora.trial import choose_path

__all__ = ["LoRALightningModule", "LossOutput"]

_LOSS_DIVISOR = 1024.0  # any constant does: it keeps a summed loss in range for fp16 and is taken out again
_PLAIN_SETTINGS = (
    "base", "revision", "trust_remote_code", "learning_rate", "weight_decay", "lr_schedule", "warmup_ratio",
    "packing", "shared_prefix", "chunked_loss", "fused_lora", "recompute_mlp", "compile_layers", "liger",
    "gradient_checkpointing", "activation_memory", "max_new_tokens",
)  # fmt: skip


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
        shared_prefix: bool = True,
        chunked_loss: bool = True,
        fused_lora: bool = True,
        recompute_mlp: bool = True,
        compile_layers: bool = False,
        liger: bool = False,
        gradient_checkpointing: bool = False,
        activation_memory: str | None = None,
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
            shared_prefix: compute what all examples of a packed batch begin with once; on a CPU, without dropout.
            chunked_loss: compute the loss from hidden states in chunks, where that is exact; else from full logits.
            fused_lora: one autograd function per adapted layer; else plain operations, for comparison.
            recompute_mlp: make the activation and product of SwiGLU MLPs again in the backward pass: half of a layer's
                activations for two elementwise passes.
            compile_layers: run each decoder layer through torch.compile, for longer runs on CUDA (unverified on
                hardware). No gain on a CPU; the first step waits for the compiler.
            liger: Liger's kernels for norms, rotary positions and gated MLPs; CUDA only (unverified on hardware).
            gradient_checkpointing: recompute each layer in the backward pass: less memory, more time.
            activation_memory: recompute only as many layers as keep activations within this, such as 4GiB; auto is what
                is free on the device.
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
        self.shared_prefix = shared_prefix
        self.chunked_loss = chunked_loss
        self.fused_lora = fused_lora
        self.recompute_mlp = recompute_mlp
        self.compile_layers = compile_layers
        self.liger = liger
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_memory = activation_memory
        self.max_new_tokens = max_new_tokens
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {warmup_ratio}")
        if optimizer is not None and weight_decay:
            raise ValueError("weight_decay has no effect on an optimizer of your own: set it there")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if activation_memory is not None and gradient_checkpointing:
            raise ValueError("activation_memory has no effect beside gradient_checkpointing: set one of them")
        if activation_memory not in (None, "auto"):
            parse_bytes(activation_memory)
        if compile_layers and quantization is not None:
            raise ValueError(compilation.QUANTIZED_REFUSED)
        if liger and (compile_layers or activation_memory is not None):
            raise ValueError(liger_kernels.refusal(compile_layers))

        self.strict_loading = False  # the base is not in checkpoints; on_load_checkpoint checks the adapter's keys
        self.model: nn.Module | None = None
        self.injection_report: InjectionReport | None = None
        self.path: causal_lm.Path | None = None
        self._recorder = StepRecorder()
        self._resume_state: dict[str, Any] | None = None
        self._means = EvaluationMeans()
        self._activation_budget: ActivationBudget | None = None
        self._compile_clock: compilation.CompileClock | None = None

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
        assert self.model is not None, "configure_model has not run"
        if self.path is None:  # an override that calls this one
            self._choose_path(self.model)
        assert self.path is not None
        batch = causal_lm.with_targets(batch)
        nll_sum, num_correct = causal_lm.language_model_loss(self.model, batch, self.path, accuracy=accuracy)  # type: ignore[arg-type]
        return LossOutput(nll_sum, batch["target_ids"].numel(), num_correct, batch.get("num_tokens"))

    def configure_model(self) -> None:
        """Load the base, inject the adapters, freeze everything else. Does nothing the second time.

        Raises:
            ValueError: if the Trainer's strategy splits the model over processes.
        """
        if self._trainer is not None:
            refuse_sharding(type(self._trainer.strategy).__name__)
        if self.model is not None:
            return
        if self.compile_layers:
            compilation.check_compiler(torch.get_default_device())
        if self.liger:
            liger_kernels.check_available(torch.get_default_device())
        model = self.load_base()
        if self.liger:
            rank_zero_info(f"Liger kernels: {', '.join(liger_kernels.apply(model))}")
        self.injection_report = inject_lora(model, self.lora)
        if not self.fused_lora:
            for _, layer in lora_layers(model):
                if isinstance(layer, LoRALinear):
                    layer.has_fast_path = False
        if self.recompute_mlp:
            recompute_gated_mlps(model)
        model.train()
        if type(self).compute_loss is LoRALightningModule.compute_loss:
            self._choose_path(model)
        if self.compile_layers:
            self._compile_clock = compilation.compile_layers(model)
        if self.gradient_checkpointing:
            checkpoint_layers(model)
        elif self.activation_memory is not None:
            if self.path is None:
                raise ValueError(
                    "activation_memory measures the loss of next tokens, and this module overrides compute_loss: set "
                    "gradient_checkpointing instead"
                )
            self._activation_budget = ActivationBudget(model, self.activation_memory, self.path)  # type: ignore[arg-type]
        self.model = model
        keep_batch_norm_frozen(model)

    def _choose_path(self, model: nn.Module) -> None:
        self.path = choose_path(
            model, packing=self.packing, direct_head=self.chunked_loss, shared_prefix=self.shared_prefix
        )
        rank_zero_info(f"Forward path: {self.path}")

    def train(self, mode: bool = True) -> LoRALightningModule:
        """Set the mode; batch norms of the frozen base stay in evaluation, so that their statistics do not move."""
        super().train(mode)
        if self.model is not None:
            keep_batch_norm_frozen(self.model)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's own forward."""
        assert self.model is not None, "configure_model has not run"
        return self.model(*args, **kwargs)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name, in the order in which the optimizer holds them."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Adapter parameters and a schedule that steps with the optimizer."""
        return optimization.configure(
            self.trainer, list(self.trainable_parameters().values()),
            optimizer=self.optimizer_callable, learning_rate=self.learning_rate, weight_decay=self.weight_decay,
            lr_scheduler=self.lr_scheduler_callable, lr_schedule=self.lr_schedule, warmup_ratio=self.warmup_ratio,
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, up to a constant factor; see :meth:`optimizer_step`."""
        if self._activation_budget is not None:
            self._activation_budget.prepare(batch["input_ids"].numel())
        output = self.compute_loss(batch)
        self._recorder.window.add(output)
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
        totals = self._recorder.reduce(self.device, self._sum_over_ranks)
        factor = _LOSS_DIVISOR * self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [p.grad for p in self.trainable_parameters().values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, (factor / totals[1].clamp(min=1)).to(gradients[0].dtype))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return torch.as_tensor(self.trainer.strategy.reduce(values, reduce_op="sum"))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Take the norms of the unclipped gradients and of the parameters, and log the step's loss."""
        parameters = list(self.trainable_parameters().values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._recorder.measure(gradients, [p.detach() for p in parameters], self.device)
        self.log("train_loss", self._recorder.loss, prog_bar=True, rank_zero_only=True)

    def _finish_step(self, optimizer: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self._recorder.finish(
            step=self.trainer.global_step + 1,
            loss_scale=scaler.get_scale() if scaler is not None else 1.0,
            learning_rate=optimizer.param_groups[0]["lr"],
        )
        if self._compile_clock is not None:
            self._compile_clock.report()
        # Reading a value makes the host wait for a CUDA device, so there it is done on logging steps only.
        if self.device.type == "cpu" or self._recorder.num_pending >= self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.flush_metrics()

    @property
    def training_metrics(self) -> TrainingMetrics:
        """The record of the run up to the last :meth:`flush_metrics`."""
        return self._recorder.metrics

    def flush_metrics(self) -> TrainingMetrics:
        """Bring ``training_metrics`` up to the last step, and return it. Waits for the device."""
        return self._recorder.flush()

    # ------------------------------------------------------------------ validation, test, prediction

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._means.add(self.compute_loss(batch, accuracy=True))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._means.add(self.compute_loss(batch, accuracy=True))

    def on_validation_epoch_start(self) -> None:
        """Start new means."""
        self._means = EvaluationMeans().to(self.device)

    def on_test_epoch_start(self) -> None:
        """Start new means."""
        self._means = EvaluationMeans().to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` (nats per token), ``val_perplexity`` and ``val_token_accuracy``."""
        results = self._finish_evaluation("val")
        at_start = self.trainer.num_sanity_val_steps == math.inf and self.trainer.global_step == 0
        whole = not self.trainer.sanity_checking or at_start
        if whole and results:
            self.flush_metrics().validation.append({"step": self.trainer.global_step, **results})
        self._recorder.start_clock()

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss``, ``test_perplexity`` and ``test_token_accuracy``."""
        self._finish_evaluation("test")

    def _finish_evaluation(self, prefix: str) -> dict[str, float]:
        results = self._means.results(prefix)
        self.log_dict(results, prog_bar=True, rank_zero_only=True)
        return {name: value.item() for name, value in results.items()}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A list of one generation: see :func:`lit_lora.prediction.answer`."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return [answer(self.model, tokenizer, batch, max_new_tokens=self.max_new_tokens)]

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
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
        """Add what an exact continuation needs, and which base and structure the adapters belong to.

        Raises:
            RuntimeError: in the middle of a batch, where there is no state to continue from.
        """
        checkpoint[training_state.KEY] = training_state.collect(
            self.trainer, self._identity, self._settings(), self._recorder, self.trainable_parameters()
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this base and these adapters; keep the rest for the start of training.

        Raises:
            ValueError: naming what differs.
        """
        state = training_state.check(checkpoint, self._identity, self.trainable_parameters())
        self._resume_state = state
        self._recorder.metrics = TrainingMetrics.from_state_dict(state["metrics"])
        if self._trainer is not None:  # without one, nothing is continued
            training_state.align(checkpoint, self.trainer)

    def on_train_start(self) -> None:
        """Continue a resumed run where it was: random state, and the gradients of an unfinished window."""
        self._recorder.start_clock()
        state, self._resume_state = self._resume_state, None
        if state is not None:
            training_state.restore(state, self.trainer, self._recorder.window, self.trainable_parameters())

    @property
    def _identity(self) -> training_state.Identity:
        assert self.model is not None, "configure_model has not run"
        return training_state.Identity(self.base, self.model, self.lora, self.quantization)

    def _settings(self) -> dict[str, Any]:
        return {
            "lora": asdict(self.lora),
            "quantization": asdict(self.quantization) if self.quantization is not None else None,
            "dtype": self.dtype_name,
            **{name: getattr(self, name) for name in _PLAIN_SETTINGS},
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> LoRALightningModule:  # type: ignore[override]
        """Build the module as it was and load the adapters; ``kwargs`` override saved settings (``base``, for one).

        Lightning's own key for hyper-parameters is not used: its command line would let the file override options.
        """
        saved = read_checkpoint(checkpoint_path).get(training_state.KEY, {}).get("settings", {})
        trust = kwargs.pop("trust_remote_code", False)  # never taken from a file
        return super().load_from_checkpoint(checkpoint_path, **{**saved, **kwargs, "trust_remote_code": trust})
