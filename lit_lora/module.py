"""The LightningModule: adapters on a frozen base, a loss that counts tokens right, checkpoints of adapters only.

For a causal language model it is complete. For any other ``nn.Module`` override two hooks: :meth:`load_base` (which
base) and :meth:`compute_loss` (which loss).

How a step's loss and gradients count tokens is its base class's matter: :mod:`lit_lora.training.token_loss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lit_lora import starting_adapter
from lit_lora.adapters.fixed_half import fixed_halves, untrained_tensors
from lit_lora.adapters.frozen_statistics import keep_batch_norm_frozen
from lit_lora.adapters.inject import InjectionReport
from lit_lora.adapters.module_names import plain_name
from lit_lora.base import trained_on
from lit_lora.base.base_hash import base_hash, forget_base, note_base
from lit_lora.base.load import load_base_model
from lit_lora.base.shards import Sharding
from lit_lora.base.streamed import load_sharded_base
from lit_lora.build import check_device, check_sharded, make_trainable
from lit_lora.config import LoRAConfig, OptimizationConfig, QuantizationConfig, StepConfig
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.interchange.adapter_folder import Base
from lit_lora.language_model.cuda_graphs import CudaGraphs, graphs_for
from lit_lora.language_model.forward import ForwardPath, language_model_loss, with_targets
from lit_lora.language_model.generation import answer
from lit_lora.language_model.trial import choose_path
from lit_lora.memory.activation_budget import ActivationBudget
from lit_lora.rewrites import compilation
from lit_lora.training import hyperparameters, on_cuda, training_record, training_state
from lit_lora.training.base_dtype import base_dtype
from lit_lora.training.new_tokens import hold_new_tokens, rows_needed
from lit_lora.training.optimization import Optimization
from lit_lora.training.resume_settings import Difference
from lit_lora.training.sharded_strategy import LoRAShardedStrategy
from lit_lora.training.start_source import check_start, resumed_ranks, start_source
from lit_lora.training.step_metrics import LossOutput
from lit_lora.training.token_loss import LOGGED, TokenLossModule
from lit_lora.training.trainer_settings import check_built, check_monitors
from lit_lora.training.training_point import TrainingPoint

__all__ = ["LoRALightningModule", "LossOutput"]


class LoRALightningModule(TokenLossModule):
    """LoRA or QLoRA fine-tuning of a frozen base model."""

    def __init__(
        self,
        base: str = "smollm2-135m-instruct",
        *,
        adapter: str | None = None,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008 (frozen)
        quantization: QuantizationConfig | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008
        step: StepConfig = StepConfig(),  # noqa: B008
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        """Store the settings; the model is built in :meth:`configure_model`.

        Args:
            base: Hub id, folder, GGUF file, a name that ``lit-lora fetch`` knows, or random:ARCHITECTURE.
            adapter: an adapter to start from, by its folder in PEFT's format or its id on the Hub; None for a new one.
                Of ``lora`` only ``lora_dropout``, ``adapter_dtype`` and ``freeze_A`` count: the rest is the adapter's.
            lora: which layers get adapters, of what rank.
            quantization: how to quantize the frozen base; None for full precision.
            dtype: dtype of the base's weights; auto is bfloat16 where the device is fast at it (CUDA from Ampere, AMX,
                AVX512-BF16 of AMD), else float16 on CUDA, float32 on a CPU; a run that goes on keeps its own.
            revision: branch, tag or commit of the base on the Hub.
            trust_remote_code: run code that comes with the base or the tokenizer.
            optimization: learning rate, its schedule, weight decay.
            step: how a step is computed: what is recomputed, compiled, fused.
            optimizer: replaces the built-in AdamW; gets adapter parameters only.
            lr_scheduler: replaces the built-in schedule; stepped after every optimizer step.
            max_new_tokens: longest generation of ``predict``, in tokens.
        """
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.lora = lora
        self.quantization = quantization
        check_start(lora, quantization)
        self.dtype_name = dtype
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.optimization = optimization
        self.step = step
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.max_new_tokens = max_new_tokens
        if optimizer is not None:
            optimization.check_beside_own_optimizer()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")

        self.strict_loading = False  # the base is not in checkpoints; on_load_checkpoint checks the adapter's keys
        self.model: nn.Module | None = None
        self.injection_report: InjectionReport | None = None
        self.path: ForwardPath | None = None
        self.started_from = ""
        """SHA-256 of the adapter that training started from; empty for a new one."""
        self._resume_state: dict[str, Any] | None = None
        self._differences: list[Difference] = []
        self._given: dict[str, Any] = {}
        self.setting_changes: list[dict[str, Any]] = []
        """What was changed when the run was resumed: ``step``, and ``settings`` by name, each as it was and is."""
        self._activation_budget: ActivationBudget | None = None
        self._compile_clock: compilation.CompileClock | None = None
        self._cuda_graphs: CudaGraphs | None = None

    # ------------------------------------------------------------------ hooks to override for other models

    def load_base(self) -> nn.Module:
        """Load the base model. Override for a model that is no causal language model."""
        return load_base_model(self.base, **self._how_to_load)

    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        """Loss of one micro-batch, summed over its targets. Override for a model that is no causal language model.

        Args:
            batch: what the dataloader gives.
            accuracy: also count correct predictions (validation and test).
        """
        assert self.model is not None, "configure_model has not run"
        if self.path is None:  # an override that calls this one
            self.path = choose_path(
                self.model,
                packing=self._packs,
                direct_head=self.step.chunked_loss,
                shared_prefix=self.step.shared_prefix,
            )
        batch = with_targets(batch)
        if self._cuda_graphs is not None and self.training and torch.is_grad_enabled() and not accuracy:
            nll_sum, num_correct = self._cuda_graphs.nll_sum(batch), None
        else:
            nll_sum, num_correct = language_model_loss(self.model, batch, self.path, accuracy=accuracy)  # type: ignore[arg-type]
        weight = batch["target_weights"].sum() if "target_weights" in batch else None
        return LossOutput(nll_sum, batch["target_ids"].numel(), num_correct, batch.get("num_tokens"), weight)

    def configure_callbacks(self) -> list[L.Callback]:
        """Refuse a Trainer, optimizer or schedule that cannot work: nothing is loaded yet.

        Raises:
            ValueError: naming the setting, and what to set instead.
        """
        check_built(self.trainer)
        self._starting_adapter()
        if self.trainer.state.fn != "fit":
            return []
        self.metrics_record.keep_in(None)  # the folder of an earlier fit is not that of this one
        own = type(self).configure_optimizers is LoRALightningModule.configure_optimizers
        return self._optimization.try_out(self.trainer) if own else []

    def setup(self, stage: str) -> None:
        """Check what callbacks wait for, and say what a step is: the data is there, and nothing else is loaded yet.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        if stage == "fit":
            on_cuda.say_what_a_step_is(self.trainer)
        if stage == "fit" and type(self) is LoRALightningModule:  # others may log more
            check_monitors(self.trainer, LOGGED)

    def configure_model(self) -> None:
        """Load the base, inject the adapters, freeze everything else. Does nothing the second time.

        Raises:
            ValueError: for Trainer settings that cannot work.
        """
        if self._trainer is not None:
            check_built(self._trainer)
        if self.model is not None:
            return
        own_base = type(self).load_base is not LoRALightningModule.load_base
        if self._sharding is not None:
            check_sharded(self.step, self.lora)
        check_device(self.step, torch.get_default_device())
        start = self._starting_adapter()
        data = getattr(self._trainer, "datamodule", None)
        if self._sharding is not None and not own_base:
            rows = rows_needed(self.lora if start is None else start.lora, data)
            model: nn.Module = load_sharded_base(self.base, self._sharding, rows=rows, **self._how_to_load)
        else:
            model = self.load_base()
        if own_base:
            forget_base(model)  # what was loaded may have been changed
        hold = hold_new_tokens if start is None else start.hold_new_tokens
        self.lora = hold(model, resumed_ranks(self.lora, self._trainer), data)
        own_loss = type(self).compute_loss is not LoRALightningModule.compute_loss
        source = start_source(self.lora, self._trainer, self.base, self._how_to_load) if start is None else None
        ways: dict[str, Any] = {"packing": self._packs, "own_loss": own_loss, "adapter": start and start.stored}
        built = make_trainable(model, self.lora, self.step, **ways, start_from=source)
        self.injection_report, self.path, self._compile_clock = built
        if (amount := self.step.activation_budget) is not None:
            if self.path is None:
                raise ValueError(
                    f"recompute {amount!r} measures the loss of next tokens, and this module overrides compute_loss: "
                    "set recompute to true, or to a number of layers"
                )
            self._activation_budget = ActivationBudget(model, amount, self.path)  # type: ignore[arg-type]
        self.model = model
        note_base(model, base_hash(model))
        if start is not None or source is not None:
            self.lora = built.report.config  # with rows for tokens that only its embedding tells of; with EVA's ranks
        if start is not None:
            self.started_from = starting_adapter.note_start(model, start, Base(self.base, self.revision))

    def _starting_adapter(self) -> starting_adapter.StartingAdapter | None:
        if self.adapter is None or self.model is not None:
            return None
        return starting_adapter.starting_adapter(self.adapter, self.lora)

    @property
    def _sharding(self) -> Sharding | None:
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy.sharding if isinstance(strategy, LoRAShardedStrategy) else None

    @cached_property
    def _how_to_load(self) -> dict[str, Any]:
        names = ("quantization", "revision", "trust_remote_code")
        dtype = base_dtype(self.dtype_name, torch.get_default_device(), self._trainer)
        return {"dtype": dtype, **{name: getattr(self, name) for name in names}}

    @property
    def _packs(self) -> bool:
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return getattr(data, "packing", True)

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
        """Parameters that train, by name (as without torch.compile)."""
        return {plain_name(name): parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Adapter parameters and a schedule that steps with the optimizer."""
        return self._optimization.configure(self.trainer, self.trainable_parameters(), fixed_halves(self))

    @property
    def _optimization(self) -> Optimization:
        return Optimization(self.optimization, self.optimizer_callable, self.lr_scheduler_callable)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, up to a constant factor."""
        if self._activation_budget is not None:
            self._activation_budget.prepare(batch["input_ids"].numel())
        return super().training_step(batch, batch_idx)

    def finish_step(self, optimizer: Any) -> None:
        """Record the step, and what compilation took of it."""
        super().finish_step(optimizer)
        if self._compile_clock is not None:
            self._compile_clock.report()

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """A generation for each prompt but fillers: see :func:`lit_lora.language_model.generation.answer`."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        answered = answer(self.model, tokenizer, batch, max_new_tokens=self.max_new_tokens)  # type: ignore[arg-type]
        return [found for found, prompt in zip(answered, batch, strict=True) if not prompt.get("filler")]

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters only: the base is loaded from where it came from."""
        prefix, kept = kwargs.get("prefix", ""), bool(kwargs.get("keep_vars"))
        return {f"{prefix}{name}": tensor if kept else tensor.detach() for name, tensor in self._adapter().items()}

    def _adapter(self) -> dict[str, Tensor]:
        return {**self.trainable_parameters(), **untrained_tensors(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load adapters; that the base is not among them is no finding."""
        own = {plain_name(name): name for name, _ in (*self.named_parameters(), *self.named_buffers())}
        state = {own.get(name, name): value for name, value in state_dict.items()}
        result = super().load_state_dict(state, strict=False, assign=assign)
        missing = self._adapter().keys() & set(map(plain_name, result.missing_keys))
        return type(result)(sorted(missing), result.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact continuation needs, and which base and structure the adapters belong to.

        Raises:
            RuntimeError: in the middle of a batch, where there is no state to continue from.
        """
        if self.model is None:  # a run that was refused, by a callback that saves on exceptions: let it be heard
            return
        state = training_state.collect(self.trainer, self._identity, self._recorder, self.trainable_parameters())
        own = {"optimizer": self._given, "changes": self.setting_changes, "training_point": self._point.state_dict()}
        own["layout"] = training_state.layout(checkpoint)
        checkpoint[training_state.KEY] = {**state, **own}
        training_record.save(self.model, checkpoint[training_state.KEY])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this base and these adapters; keep the rest for the start of training.

        Raises:
            ValueError: naming what differs.
        """
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        state, self._differences = training_state.check(checkpoint, self._identity, self._adapter(), goes_on=goes_on)
        self._resume_state = state
        self.setting_changes = list(state["changes"])
        if self._trainer is not None:  # without one, nothing is continued
            training_state.align(checkpoint, self.trainer)
            if self.trainer.state.fn == "fit":
                training_state.restore_record(state, self.trainer, self.metrics_record)
            training_record.check_tokenizer(self.trainer, training_record.saved(state))
        elif self.model is not None:
            trained_on.complete(self.model, training_record.saved(state))

    def on_fit_start(self) -> None:
        """Note what the optimizer was given, before a checkpoint brings what it had, and the data; tell loggers.

        Raises:
            ValueError: if the checkpoint's optimizer or schedule is of another class.
        """
        if self.model is not None:
            training_record.note_data(self.trainer, self.model)
            on_cuda.say_what_float16_needs(self.trainer, self.model)
        on_cuda.let_go_of_buffers(self.trainer, self)
        self._given = training_state.given(self.trainer)
        if self._resume_state is not None:
            training_state.check_optimizer(self._resume_state["optimizer"], self._given)
        if self.trainer.enable_autolog_hparams:
            hyperparameters.log(self.trainer, self.settings())

    def on_train_start(self) -> None:
        """Continue a resumed run where it was: random state, and the gradients of an unfinished window."""
        if self.path and self.device.type == "cuda" and isinstance(self.trainer.strategy, SingleDeviceStrategy):
            self._cuda_graphs = graphs_for(self.model, self.step, self.path, self._optimized())  # type: ignore[arg-type]
        self._recorder.start_clock()
        self._point = TrainingPoint(self.trainer.optimizers, self.trainable_parameters())
        state, self._resume_state = self._resume_state, None
        if state is not None:
            self._point.load_state_dict(state.get("training_point", {}))
            training_state.restore(state, self.trainer, self._recorder.window, self.trainable_parameters())
            found = self._differences + training_state.apply_settings(state, self.trainer, self._given)
            self.setting_changes += training_state.said(found, self.trainer)

    def on_train_end(self) -> None:
        """Let go of recorded steps: parameters may be moved from here on."""
        self._cuda_graphs = None

    @property
    def _identity(self) -> training_state.Identity:
        assert self.model is not None, "configure_model has not run"
        return training_state.Identity(self.base, self.model, self.settings())

    def settings(self) -> dict[str, Any]:
        """All that the module was given, by name, plain types; optimizer and schedule say themselves what they are."""
        left_out = {"self", "optimizer", "lr_scheduler"}
        names = inspect.signature(LoRALightningModule.__init__).parameters.keys() - left_out
        values = {name: getattr(self, {"dtype": "dtype_name"}.get(name, name)) for name in sorted(names)}
        return {
            name: asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in values.items()
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> LoRALightningModule:  # type: ignore[override]
        """Build the module as it was and load the adapters; ``kwargs`` override saved settings (``base``, for one).

        Lightning's own key for hyper-parameters is not used: its command line would let the file override options.
        """
        state = read_checkpoint(checkpoint_path).get(training_state.KEY, {})
        saved = training_record.settings_as_trained(state, same_base="base" not in kwargs)
        trust = kwargs.pop("trust_remote_code", False)  # never taken from a file
        with starting_adapter.from_checkpoint(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, **{**saved, **kwargs, "trust_remote_code": trust})
