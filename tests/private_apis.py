"""Every private name of another library that is used here: who uses it, why, and when that can end.

``test_private_apis.py`` holds that the table is whole, has no row too many, and is true of what is installed.
"""

from __future__ import annotations

from typing import NamedTuple


class Private(NamedTuple):
    """A name that its library may change without notice."""

    symbol: str
    """As imported (``torch._C.x``), or ``._x`` for an attribute."""
    users: str
    """Files, with spaces between."""
    why: str
    until: str
    """When it can go."""
    of: str = ""
    """The class or module whose attribute it is."""
    upstream: str = ""
    """Where its library is asked for a public way, if that is known."""


_FAKE = "no values are computed in a trace, and code that needs values has to tell"
_PUBLIC_FAKE = "torch makes fake tensors public"
_HOOKS = "a layer with hooks takes its general forward, which calls them"
_PARSER = "which options there are; argparse shares its list with no one"

PRIVATE = (
    # torch
    Private("torch._subclasses.fake_tensor.FakeTensor",
            "lit_lora/adapters/direct_reads.py lit_lora/base/quantize.py lit_lora/base/quantized_forward.py "
            "lit_lora/kernels/cuda_stand_ins.py lit_lora/kernels/cuda_way.py lit_lora/language_model/trial_run.py",
            _FAKE, _PUBLIC_FAKE),
    Private("torch._subclasses.fake_tensor.FakeTensorMode",
            "lit_lora/kernels/cuda_stand_ins.py lit_lora/memory/valueless.py", _FAKE, _PUBLIC_FAKE),
    Private("torch._subclasses.fake_tensor.unset_fake_temporarily",
            "lit_lora/base/expert_codes.py lit_lora/base/quantize.py lit_lora/base/quantized_experts.py",
            "bitsandbytes' table of codes has values although it is made within a trace", _PUBLIC_FAKE),
    Private("torch.utils._python_dispatch.TorchDispatchMode",
            "lit_lora/adapters/direct_reads.py lit_lora/memory/storage_tracker.py",
            "sees each operator's tensors", "torch documents it under a public name"),
    Private("torch.utils._python_dispatch._disable_current_modes",
            "lit_lora/language_model/trial.py lit_lora/rewrites/fused_elementwise.py",
            "rules of attention masks are computed within a mode that records and keeps no values",
            "torch documents it under a public name"),
    Private("torch.utils._pytree.tree_map_only", "lit_lora/base/quantized_experts.py",
            "operators get values in place of codes, in trees of arguments", "torch documents it under a public name"),
    Private("torch.utils._pytree.tree_leaves",
            "lit_lora/adapters/direct_reads.py lit_lora/base/quantized_experts.py lit_lora/memory/storage_tracker.py "
            "lit_lora/rewrites/routed_experts.py",
            "tensors in nested arguments", "torch.utils.pytree is public in the oldest torch that we support"),
    Private("torch.utils._pytree.tree_map", "lit_lora/adapters/factored_weight.py lit_lora/adapters/layers.py",
            "tensors in nested arguments", "torch.utils.pytree is public in the oldest torch that we support"),
    Private("._cdata",
            "lit_lora/adapters/direct_reads.py lit_lora/language_model/attention_calls.py "
            "lit_lora/language_model/trial_run.py lit_lora/memory/storage_tracker.py",
            "which storage it is, also for fake tensors, which have no data_ptr", "storages have a public identity",
            "torch.UntypedStorage"),
    Private("._version", "lit_lora/adapters/shared_input.py lit_lora/language_model/trial_run.py",
            "whether something wrote into a tensor",
            "torch makes the counter public", "torch.Tensor"),
    Private("torch.nn.modules.batchnorm._BatchNorm",
            "lit_lora/adapters/direct_reads.py lit_lora/adapters/frozen_statistics.py",
            "all kinds of batch norm, also those of other packages", "it has a public name"),
    Private("torch.ops.aten._unsafe_view", "lit_lora/adapters/functional.py lit_lora/adapters/half_precision.py",
            "what a function returns as a view of its own must not be changed in place",
            "torch has a public function for it"),
    Private("torch._softmax_backward_data", "lit_lora/kernels/blockwise_attention.py",
            "the gradient of a softmax from its result", "torch has a public function for it"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "lit_lora/kernels/flash_attention.py",
            "key heads that several query heads share are read in place, and the output is kept once",
            "scaled_dot_product_attention does both"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
            "lit_lora/kernels/flash_attention.py", "its gradient", "scaled_dot_product_attention does both"),
    Private("torch.ops.mkldnn._linear_pointwise", "lit_lora/kernels/products.py",
            "torch has no setting that chooses oneDNN for float32", "torch asks oneDNN by itself on AMD processors"),
    Private("torch._foreach_norm",
            "callbacks/_support/norms.py lit_lora/memory/traced_step.py "
            "lit_lora/training/step_metrics.py",
            "norms of many tensors in few kernels", "a public function gives the norm of each"),
    Private("torch._foreach_mul_", "lit_lora/memory/traced_step.py lit_lora/training/token_loss.py",
            "scale many tensors in few kernels", "a public function does it"),
    Private("torch._foreach_add_", "lit_lora/language_model/cuda_graphs.py",
            "add many tensors to many in few kernels", "a public function does it"),
    Private("torch._foreach_zero_", "lit_lora/language_model/cuda_graphs.py",
            "empty many tensors in few kernels", "a public function does it"),
    Private("torch._foreach_copy_", "lit_lora/adapters/half_precision.py",
            "convert many tensors in one kernel", "a public function does it"),
    Private("torch.testing._internal.distributed.fake_pg.FakeStore", "lit_lora/memory/traced_step.py",
            "a step of several processes is traced in one", "torch documents its fake process group"),
    Private("torch._grouped_mm", "lit_lora/memory/valueless.py", "has no fake version in float32",
            "torch gives it one"),
    Private("torch._C._current_autograd_node", "lit_lora/memory/storage_tracker.py",
            "which module a storage of the backward pass belongs to", "torch.autograd.graph tells the current node"),
    Private("torch._C._autograd._get_sequence_nr", "lit_lora/memory/storage_tracker.py",
            "which module a storage of the backward pass belongs to", "torch.autograd.graph tells a node's number"),
    Private("._sequence_nr", "lit_lora/memory/storage_tracker.py",
            "which module a storage of the backward pass belongs to", "torch.autograd.graph tells a node's number",
            "torch._C._FunctionBase"),
    Private("torch._dynamo.exc.TorchDynamoException", "lit_lora/rewrites/compilation.py",
            "a failed compilation is told from an error of the model", "torch.compiler has the class"),
    Private("torch._dynamo.utils.calculate_time_spent", "lit_lora/rewrites/compilation.py",
            "how long compiling took", "torch.compiler tells it"),
    Private("torch._inductor.runtime.cache_dir_utils.cache_dir", "lit_lora/rewrites/compilation.py",
            "where compiled layers are kept, to be said", "torch.compiler tells it"),
    Private("._orig_mod", "lit_lora/adapters/module_names.py",
            "names of a compiled module are those of the one within", "torch.compile keeps names",
            "torch._dynamo.eval_frame.OptimizedModule"),
    Private("._checkpoint_wrapped_module", "lit_lora/adapters/module_names.py",
            "names of a wrapped module are those of the one within", "its wrapper keeps names",
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"),
    Private("._forward_hooks", "lit_lora/base/base_weight.py", _HOOKS, "modules tell their hooks", "torch.nn.Module"),
    Private("._forward_pre_hooks", "lit_lora/base/base_weight.py", _HOOKS, "modules tell their hooks",
            "torch.nn.Module"),
    Private("._backward_hooks", "lit_lora/base/base_weight.py", _HOOKS, "modules tell their hooks", "torch.nn.Module"),
    Private("._backward_pre_hooks", "lit_lora/base/base_weight.py", _HOOKS, "modules tell their hooks",
            "torch.nn.Module"),
    Private("._modules", "lit_lora/adapters/module_names.py lit_lora/base/module_state.py",
            "children under several names, which named_children leaves out", "named_children lists them",
            "torch.nn.Module"),
    Private("._parameters", "lit_lora/base/module_state.py lit_lora/rewrites/fused_elementwise.py",
            "what a trial left on a module is undone", "a module can be copied without its tensors",
            "torch.nn.Module"),
    Private("._buffers", "lit_lora/base/module_state.py", "what a trial left on a module is undone",
            "a module can be copied without its tensors", "torch.nn.Module"),
    Private("._non_persistent_buffers_set", "callbacks/_support/checksum.py",
            "caches are no part of the base's weights", "named_buffers tells which are saved", "torch.nn.Module"),
    Private("._step_supports_amp_scaling", "callbacks/gradient_norm.py lit_lora/training/optimization.py",
            "a fused optimizer that unscales gradients itself does so after they are logged and clipped",
            "Lightning clips gradients of fused optimizers", "torch.optim.adam",
            "https://github.com/Lightning-AI/pytorch-lightning/issues/21435"),
    # Lightning
    Private("lightning.pytorch.strategies.launchers._SubprocessScriptLauncher", "callbacks/rank_monitor.py",
            "the processes that this one started have to be ended", "launchers have a public way to end them"),
    Private("._data_fetcher", "callbacks/training_checkpoint.py", "whether a validation follows this batch",
            "Lightning tells it", "lightning.pytorch.loops.fit_loop._FitLoop"),
    Private("._should_check_val_fx", "callbacks/training_checkpoint.py", "whether a validation follows this batch",
            "Lightning tells it", "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"),
    Private("._combined_loader", "lit_lora/training/schedule.py", "a resumed run makes its loaders again",
            "estimated_stepping_batches leaves loaders to be made", "lightning.pytorch.loops.fit_loop._FitLoop"),
    Private("._accelerator_connector", "lit_lora/data/batches/limits.py", "whether Lightning replaces the sampler",
            "the Trainer tells use_distributed_sampler", "lightning.pytorch.Trainer"),
    Private("._start_method", "lit_lora/training/trainer_settings.py", "how a strategy starts its processes",
            "strategies tell it", "lightning.pytorch.strategies.DDPStrategy"),
    Private("._trainer", "lit_lora/module.py", "whether there is a Trainer: the property raises without one",
            "LightningModule tells whether it is attached", "lightning.pytorch.LightningModule"),
    Private("._parser", "lit_lora/cli/lightning_cli.py", "the parser of a verb", "LightningCLI tells it",
            "lightning.pytorch.cli.LightningCLI"),
    Private("._get", "lit_lora/cli/lightning_cli.py", "settings of the verb at hand", "LightningCLI tells them",
            "lightning.pytorch.cli.LightningCLI"),
    Private("._dump_config", "lit_lora/cli/lightning_cli.py", "the config as it was resolved",
            "LightningCLI tells it", "lightning.pytorch.cli.LightningCLI"),
    # jsonargparse
    Private("._enable_path", "lit_lora/cli/lightning_cli.py", "a file of data is not read in place of its name",
            "jsonargparse can be told for an option", "jsonargparse._typehints.ActionTypeHint"),
    Private("._actions", "lit_lora/cli/config_check.py lit_lora/cli/help.py lit_lora/cli/lightning_cli.py "
            "lit_lora/cli/setting_check.py", _PARSER,
            "jsonargparse lists its options", "jsonargparse.ArgumentParser"),
    Private("._typehint", "lit_lora/cli/help.py lit_lora/cli/setting_check.py", "the type of an option",
            "jsonargparse tells it", "jsonargparse._typehints.ActionTypeHint"),
    Private("._ActionConfigLoad", "lit_lora/cli/help.py", "the option that loads a group from a file, of which help is "
            "silent", "jsonargparse tells its kinds of options apart", "jsonargparse._actions"),
    # transformers
    Private("._update_model_kwargs_for_generation", "lit_lora/language_model/full_batches.py",
            "whether a model carries something of its own from token to token", "transformers says so of a class",
            "transformers.GenerationMixin"),
    Private("._MODEL_TO_CONVERSION_PATTERN", "lit_lora/adapters/peft_limits.py",
            "for which models PEFT converts the names in an adapter", "PEFT tells it",
            "transformers.conversion_mapping"),
    Private("._attn_implementation_internal", "lit_lora/base/attention_choice.py",
            "attention is another for one forward pass, and nothing else of the config changes",
            "an attention can be chosen for a call", "transformers.PreTrainedConfig"),
    Private("._init_weights", "lit_lora/base/filled.py lit_lora/base/stored.py",
            "random weights, and buffers that no file holds, a layer at a time",
            "transformers initializes single modules publicly", "transformers.PreTrainedModel"),
    Private("._keep_in_fp32_modules", "lit_lora/base/stored.py",
            "a model some of whose weights stay wide is loaded by transformers itself", "a model tells it publicly",
            "transformers.PreTrainedModel"),
    Private("._keep_in_fp32_modules_strict", "lit_lora/base/stored.py",
            "a model some of whose weights stay wide is loaded by transformers itself", "a model tells it publicly",
            "transformers.PreTrainedModel"),
    Private("._is_hf_initialized", "lit_lora/base/expert_codes.py", "transformers starts parameters without it anew",
            "a parameter can be marked as loaded", "transformers.PreTrainedModel"),
    Private("._schema", "lit_lora/base/quantized_experts.py",
            "which arguments an operator writes to", "torch documents it", "torch.ops"),
    Private("torch.Tensor._make_wrapper_subclass", "lit_lora/base/quantized_experts.py",
            "a tensor by shape and type, without memory",
            "torch documents it under a public name"),
    Private("torch.ops.aten._to_copy.default", "lit_lora/base/quantized_experts.py",
            "a conversion leaves codes as they are",
            "torch documents it under a public name"),
    Private("._weight_conversions", "lit_lora/base/quantize.py",
            "save_pretrained would reverse the conversions of a quantized folder", "a model can be told",
            "transformers.core_model_loading"),
    Private("._name_or_path", "lit_lora/base/load.py", "says where a config lay, not what is in it",
            "transformers leaves it out of to_dict", "transformers.PreTrainedConfig"),
    Private("._model_name_or_path", "lit_lora/tools/fetch.py", "a title in a GGUF file that no one can load",
            "transformers leaves it out", "transformers.integrations.ggml"),
    Private("._from_model_config", "lit_lora/evaluation/merge.py",
            "transformers 4 would take config.json's ids in place of those in the generation config",
            "transformers 4 is not used with merged models any more", "transformers.GenerationConfig"),
    # others
    Private("bitsandbytes.functional._convert_weight_packed_for_cpu_inverse", "lit_lora/base/base_weight.py",
            "an eval forward repacks weights into a layout without a backward", "bitsandbytes has a backward for it"),
    Private("liger_kernel.transformers._apply_liger_kernel_to_instance", "lit_lora/rewrites/liger_kernels.py",
            "the model is there already", "Liger has a public function for instances"),
)  # fmt: skip
