"""What other trainers call a setting, and what it is here: PEFT, TRL, transformers, litgpt, Unsloth, axolotl.

One table for all verbs, on the command line and in YAML. A name that is no setting and not in the table is compared
letter by letter, but only with what is close: a wrong guess is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable

from lit_lora.files.meant import closest, did_you_mean

_CLOSE = 0.75


Meaning = dict[str, str] | str
"""Keys that a name can be, over all verbs, each with how its value translates; or why it is not supported."""


def _to(keys: str, note: str = "") -> dict[str, str]:
    return dict.fromkeys(keys.split(), note)


_BASE = "model.base base"
_OUTPUT = "trainer.default_root_dir output"
_BITS = "model.quantization.bits quantization.bits"
_ADAPTER = _to("adapter source") | _to("ckpt_path", "a checkpoint of a run (.ckpt), to go on with it")
_SCHEDULE = _to("model.optimization.lr_schedule", "cosine, linear or constant; model.lr_scheduler takes a class")
_EVERY_STEPS = "the number of steps"
_ONE_LOSS = "the loss is the cross-entropy of the supervised tokens"
_VARIANT = "its variants are model.lora.use_rslora, use_dora and init_lora_weights"

_CLOSED_GROUPS = (
    "checkpoint", "convergence", "export", "gradient_flow", "gradient_norm", "memory", "throughput",
    "model.quantization", "quantization",
)  # fmt: skip
"""Groups in which other names would mean other things than at large: for these only their own settings are named."""

SYNONYMS: dict[str, Meaning] = {
    # how long, how fast, in what batches
    "lr": _to("model.optimization.learning_rate"),
    "learning_rate": _to("model.optimization.learning_rate"),
    "max_lr": _to("model.optimization.learning_rate"),
    "min_lr": "the built-in schedules end at 0; give model.lr_scheduler for another",
    "epochs": _to("trainer.max_epochs"),
    "num_epochs": _to("trainer.max_epochs"),
    "num_train_epochs": _to("trainer.max_epochs", "a whole number"),
    "epoch": _to("trainer.max_epochs"),
    "steps": _to("trainer.max_steps"),
    "max_steps": _to("trainer.max_steps"),
    "num_steps": _to("trainer.max_steps"),
    "max_iters": _to("trainer.max_steps"),
    "iters": _to("trainer.max_steps"),
    "micro_batch_size": _to("data.batch_size"),
    "train_batch_size": _to("data.batch_size"),
    "per_device_train_batch_size": _to("data.batch_size"),
    "per_device_eval_batch_size": _to("data.batch_size", "validation uses that of training") | _to("batch_size"),
    "global_batch_size": _to("trainer.accumulate_grad_batches", "global batch / (data.batch_size x processes)"),
    "gradient_accumulation_steps": _to("trainer.accumulate_grad_batches"),
    "gradient_accumulation_iters": _to("trainer.accumulate_grad_batches"),
    "grad_accum": _to("trainer.accumulate_grad_batches"),
    "auto_find_batch_size": "lit-lora estimate says what fits; model.step.recompute auto recomputes what it must",
    "max_grad_norm": _to("trainer.gradient_clip_val"),
    "max_norm": _to("trainer.gradient_clip_val"),
    "grad_clip": _to("trainer.gradient_clip_val"),
    "clip_grad_norm": _to("trainer.gradient_clip_val"),
    "warmup_steps": _to("model.optimization.warmup_ratio", "warm-up steps / all steps"),
    "lr_warmup_steps": _to("model.optimization.warmup_ratio", "warm-up steps / all steps"),
    "num_warmup_steps": _to("model.optimization.warmup_ratio", "warm-up steps / all steps"),
    "warmup": _to("model.optimization.warmup_ratio", "a share of all steps"),
    "lr_scheduler_type": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "lr_scheduler_kwargs": _to("model.lr_scheduler", "a class of torch.optim.lr_scheduler with its arguments"),
    "optim": _to("model.optimizer", "a class, such as SGD; without it a fused AdamW is used"),
    "optim_args": _to("model.optimizer", "a class with its arguments: --model.optimizer SGD --model.optimizer.lr 0.1"),
    "adam_beta1": _to("model.optimizer", "--model.optimizer AdamW --model.optimizer.betas [0.9,0.95]"),
    "adam_beta2": _to("model.optimizer", "--model.optimizer AdamW --model.optimizer.betas [0.9,0.95]"),
    "adam_epsilon": _to("model.optimizer", "--model.optimizer AdamW --model.optimizer.eps 1e-8"),
    "group_by_length": "packing runs examples of all lengths without padding",
    "length_column_name": "lengths are measured",
    "dataloader_num_workers": _to("data.num_workers"),
    "dataloader_pin_memory": "batches are small: token ids only",
    "dataloader_drop_last": "every example counts: the last batch is normalised by its own tokens",
    # precision, memory, hardware
    "bf16": _to("model.dtype", "bfloat16 holds the base so, adapters stay float32; or trainer.precision bf16-mixed"),
    "fp16": _to("model.dtype", "float16 holds the base so, adapters stay float32; or trainer.precision 16-mixed"),
    "tf32": "call torch.set_float32_matmul_precision in a script of your own",
    "mixed_precision": _to("trainer.precision", "bf16-mixed, 16-mixed or 32-true"),
    "torch_dtype": _to("model.dtype dtype"),
    "dtype": _to("model.dtype"),
    "load_in_4bit": _to(_BITS, "4"),
    "load_in_8bit": _to(_BITS, "8"),
    "quantize": _to(_BITS, "4 for NF4, 8 for LLM.int8"),
    "quantization_bit": _to(_BITS, "4 or 8"),
    "quantization_config": _to("model.quantization quantization", "bits, quant_type, double_quant, compute_dtype"),
    "bnb_4bit_quant_type": _to("model.quantization.quant_type quantization.quant_type"),
    "bnb_4bit_compute_dtype": _to("model.quantization.compute_dtype quantization.compute_dtype"),
    "bnb_4bit_use_double_quant": _to("model.quantization.double_quant quantization.double_quant"),
    "use_double_quant": _to("model.quantization.double_quant quantization.double_quant"),
    "use_nested_quant": _to("model.quantization.double_quant quantization.double_quant"),
    "bnb_4bit_quant_storage": "quantized weights are kept as bytes: nothing shards them",
    "llm_int8_threshold": "8-bit products use bitsandbytes' default",
    "llm_int8_skip_modules": _to("model.quantization.skip_modules quantization.skip_modules"),
    "gradient_checkpointing": _to("model.step.recompute", "true or false"),
    "activation_memory": _to("model.step.recompute", "an amount such as 4GiB"),
    "use_gradient_checkpointing": _to("model.step.recompute", "true or false"),
    "activation_checkpointing": _to("model.step.recompute"),
    "gradient_checkpointing_kwargs": "recomputation is always the non-reentrant one",
    "torch_compile": _to("model.step.compile_layers"),
    "compile": _to("model.step.compile_layers"),
    "use_liger_kernel": _to("model.step.liger"),
    "use_liger": _to("model.step.liger"),
    "flash_attention": "attention is chosen for the model and tried before the run, which says what it took",
    "attn_implementation": "attention is chosen for the model and tried before the run, which says what it took",
    "use_cpu": _to("trainer.accelerator", "cpu"),
    "no_cuda": _to("trainer.accelerator", "cpu"),
    "device": _to("trainer.accelerator", "cpu or gpu"),
    "device_map": "trainer.strategy lora_sharded divides the base among trainer.devices",
    "n_gpu": _to("trainer.devices"),
    "num_gpus": _to("trainer.devices"),
    "nproc_per_node": _to("trainer.devices", "with trainer.strategy ddp or lora_sharded"),
    "num_processes": _to("trainer.devices", "with trainer.strategy ddp or lora_sharded"),
    "ddp": _to("trainer.strategy", "ddp"),
    "ddp_find_unused_parameters": "all adapters take part in every step",
    "deepspeed": "trainer.strategy lora_sharded divides the base among processes, and ddp the work alone",
    "fsdp": "trainer.strategy lora_sharded divides the base among processes, and ddp the work alone",
    "max_memory": _to("memory.budget_mib", "a number of MiB that the run is judged by"),
    # the adapter
    "lora_r": _to("model.lora.r"),
    "lora_rank": _to("model.lora.r"),
    "rank": _to("model.lora.r"),
    "r": _to("model.lora.r"),
    "alpha": _to("model.lora.lora_alpha"),
    "lora_alpha": _to("model.lora.lora_alpha"),
    "dropout": _to("model.lora.lora_dropout"),
    "lora_dropout": _to("model.lora.lora_dropout"),
    "target_modules": _to("model.lora.target_modules"),
    "lora_target": _to("model.lora.target_modules"),
    "lora_target_modules": _to("model.lora.target_modules"),
    "lora_target_linear": _to("model.lora.target_modules", "all-linear"),
    "lora_modules_to_save": _to("model.lora.modules_to_save"),
    "modules_to_save": _to("model.lora.modules_to_save"),
    "additional_target": _to("model.lora.modules_to_save"),
    "layers_to_transform": _to("model.lora.layers_to_transform"),
    "rank_pattern": _to("model.lora.rank_pattern"),
    "alpha_pattern": _to("model.lora.alpha_pattern"),
    "use_rslora": _to("model.lora.use_rslora"),
    "init_lora_weights": _to("model.lora.init_lora_weights"),
    "peft_config": _to("model.lora"),
    "lora_config": _to("model.lora"),
    "use_peft": "every run trains adapters",
    "use_lora": "every run trains adapters",
    "use_qlora": _to(_BITS, "4"),
    "finetuning_type": "every run trains adapters",
    "task_type": "a run fine-tunes a causal language model; for others override load_base and compute_loss",
    "peft_type": f"every run trains LoRA: {_VARIANT}",
    "use_dora": _to("model.lora.use_dora"),
    "loftq_config": _to("model.lora.init_lora_weights", "loftq"),
    "eva_config": _to("model.lora.init_lora_weights", "eva") | _to("model.lora.eva_rho"),
    "corda_config": _to("model.lora.init_lora_weights", "corda"),
    "lora_ga_config": f"LoRA-GA is not there yet: {_VARIANT}",
    "loraplus_lr_ratio": _to("model.optimization.lora_plus_ratio"),
    "lora_bias": _to("model.lora.lora_bias"),
    "bias": _to("model.lora.bias"),
    "fan_in_fan_out": "how a layer holds its weight is seen from the layer",
    "target_parameters": _to("model.lora.target_parameters"),
    "trainable_token_indices": _to("model.lora.trainable_token_indices"),
    "megatron_config": "Megatron's layers are not supported",
    "adapter": _ADAPTER,
    "adapter_path": _ADAPTER,
    "adapter_dir": _ADAPTER,
    "adapter_name_or_path": _ADAPTER,
    "lora_model_dir": _ADAPTER,
    "lora": _to("model.lora adapter"),
    "peft_model": _to("adapter"),
    # the base
    "model_name_or_path": _to(_BASE),
    "model_name": _to(_BASE),
    "model_id": _to(_BASE),
    "model": _to(_BASE),
    "pretrained_model_name_or_path": _to(_BASE),
    "base_model": _to(_BASE),
    "base_model_name_or_path": _to(_BASE),
    "checkpoint_dir": _to(_BASE),
    "model_revision": _to("model.revision"),
    "trust_remote_code": _to("model.trust_remote_code", "for the base and the tokenizer"),
    "tokenizer_name": _to("data.tokenizer"),
    "tokenizer_name_or_path": _to("data.tokenizer"),
    "tokenizer_path": _to("data.tokenizer"),
    "chat_template": "the tokenizer's own is used, and the layout of Alpaca where it has none",
    "chat_template_path": "the tokenizer's own is used, and the layout of Alpaca where it has none",
    "template": "the tokenizer's own is used, and the layout of Alpaca where it has none",
    "hub_token": "log in with the Hub's own `hf auth login`, or set HF_TOKEN",
    "token": "log in with the Hub's own `hf auth login`, or set HF_TOKEN",
    # data
    "dataset": _to("data.train data"),
    "datasets": _to("data.train data", "one file or Hub dataset"),
    "dataset_name": _to("data.train", "name, name:config or name@split"),
    "dataset_path": _to("data.train data"),
    "data_path": _to("data.train data"),
    "json_path": _to("data.train data"),
    "train_file": _to("data.train"),
    "train_data": _to("data.train"),
    "train_dataset": _to("data.train"),
    "eval_dataset": _to("data.validation"),
    "validation_file": _to("data.validation"),
    "val_data": _to("data.validation"),
    "test_file": _to("data.test"),
    "val_set_size": _to("data.validation_fraction", "a share, below 1"),
    "val_size": _to("data.validation_fraction", "a share, below 1"),
    "val_split_fraction": _to("data.validation_fraction"),
    "dataset_text_field": _to("data.columns", '{"text": NAME}'),
    "text_column": _to("data.columns", '{"text": NAME}'),
    "text_field": _to("data.columns", '{"text": NAME}'),
    "prompt_column": _to("data.columns", '{"prompt": NAME}'),
    "response_column": _to("data.columns", '{"completion": NAME}'),
    "max_seq_length": _to("data.max_length"),
    "max_seq_len": _to("data.max_length"),
    "model_max_length": _to("data.max_length"),
    "sequence_len": _to("data.max_length"),
    "cutoff_len": _to("data.max_length"),
    "block_size": _to("data.max_length"),
    "sample_packing": _to("data.packing"),
    "packing_strategy": _to("data.packing", "true or false"),
    "padding_free": _to("data.packing"),
    "eval_packing": _to("data.packing"),
    "max_train_samples": _to("data.limit"),
    "max_samples": _to("data.limit limit"),
    "num_samples": _to("data.limit limit"),
    "train_on_inputs": _to("data.train_on_prompt"),
    "completion_only_loss": _to("data.train_on_prompt", "the opposite: false learns the answers only"),
    "assistant_only_loss": _to("data.train_on_prompt", "the opposite: false learns the answers only"),
    "mask_prompt": _to("data.train_on_prompt", "the opposite: false learns the answers only"),
    "train_on_responses_only": _to("data.train_on_prompt", "the opposite: false learns the answers only"),
    "mask_history": _to("data.train_on_turns", "last"),
    "mask_reasoning_content": _to("data.reasoning", "mask"),
    "excess_length_strategy": _to("data.long_rows", "truncate, drop or split"),
    "truncation_strategy": _to("data.long_rows", "truncate, drop or split"),
    "remove_unused_columns": "only the columns of the format are read",
    "streaming": "the data is tokenized once into a cache on disk",
    "dataset_num_proc": "tokenizing runs in one process, and once",
    "preprocessing_num_workers": "tokenizing runs in one process, and once",
    "shuffle_dataset": _to("data.shuffle"),
    "data_seed": _to("data.seed"),
    "seed": _to("seed_everything", "data.seed is that of the order of the data"),
    "random_state": _to("seed_everything", "data.seed is that of the order of the data"),
    # what is written, and when
    "output_dir": _to(_OUTPUT),
    "out_dir": _to(_OUTPUT),
    "output": _to(_OUTPUT),
    "save_dir": _to(_OUTPUT),
    "save_path": _to(_OUTPUT),
    "run_name": _to(_OUTPUT, "the folder is the name of the run"),
    "overwrite_output_dir": "a run never writes into the folder of an earlier one: it takes the next free name",
    "do_train": "lit-lora fit trains",
    "do_eval": "lit-lora validate evaluates; fit does so too where there is validation data",
    "do_predict": "lit-lora predict does",
    "logging_steps": _to("trainer.log_every_n_steps"),
    "log_interval": _to("trainer.log_every_n_steps"),
    "logging_dir": _to("trainer.logger", "a class with its folder: TensorBoardLogger, and trainer.logger.save_dir"),
    "report_to": _to("trainer.logger", "a class such as TensorBoardLogger, or false; metrics.csv is always written"),
    "logger_name": _to("trainer.logger", "a class such as TensorBoardLogger, or false; metrics.csv is always written"),
    "wandb_project": _to("trainer.logger", "WandbLogger, with --trainer.logger.project NAME"),
    "disable_tqdm": _to("trainer.enable_progress_bar", "the opposite: false for no bar"),
    "eval_steps": _to("trainer.val_check_interval", f"{_EVERY_STEPS} x trainer.accumulate_grad_batches"),
    "eval_interval": _to("trainer.val_check_interval", f"{_EVERY_STEPS} x trainer.accumulate_grad_batches"),
    "eval_strategy": _to("trainer.val_check_interval", "a number of batches, or a share of an epoch"),
    "evaluation_strategy": _to("trainer.val_check_interval", "a number of batches, or a share of an epoch"),
    "save_steps": _to("checkpoint.every_n_steps"),
    "save_interval": _to("checkpoint.every_n_steps"),
    "save_strategy": _to("checkpoint.every_n_steps", "a number of steps; also every checkpoint.every_n_minutes"),
    "save_total_limit": _to("checkpoint.keep_last", "checkpoint.keep_best keeps the best ones besides"),
    "load_best_model_at_end": "the best adapter is written beside the last one, to adapter-best",
    "metric_for_best_model": _to("checkpoint.monitor", "and export.monitor for the adapter"),
    "greater_is_better": _to("checkpoint.mode", "max or min; and export.mode for the adapter"),
    "early_stopping_patience": _to("trainer.callbacks+", "EarlyStopping, with --trainer.callbacks.monitor val_loss"),
    "resume_from_checkpoint": _to("ckpt_path", "a file, a folder of them, or last"),
    "resume": _to("ckpt_path", "a file, a folder of them, or last"),
    "checkpoint": _to("ckpt_path source"),
    "ckpt": _to("ckpt_path source"),
    "push_to_hub": "nothing is uploaded: `hf upload` takes the adapter's folder",
    "save_only_model": "checkpoints hold the adapter and what a resume needs, never the base",
    "save_safetensors": "adapters are always written as safetensors",
    "merge_and_unload": "lit-lora merge does so, after the run",
    # other losses and methods
    "neftune_noise_alpha": "noise on embeddings is not there",
    "noisy_embedding_alpha": "noise on embeddings is not there",
    "label_smoothing_factor": _ONE_LOSS,
    "loss_type": _ONE_LOSS,
    "beta": "preference losses are not there yet: a run learns from answers",
    "stage": "a run is supervised fine-tuning",
    # generation
    "max_tokens": _to("max_new_tokens model.max_new_tokens"),
    "max_length": _to("data.max_length max_new_tokens"),
    "do_sample": _to("temperature", "above 0 to sample, 0 for the most likely token"),
    "top_k": "sampling is by temperature and top_p",
    "min_p": "sampling is by temperature and top_p",
    "num_beams": "answers are sampled, or the most likely token is taken each time",
    "repetition_penalty": "sampling is by temperature and top_p",
    "system_prompt": _to("system"),
    "instruction": _to("prompt"),
    "input": _to("prompt"),
    "question": _to("prompt"),
    "safe_serialization": "weights are always written as safetensors",
    "max_shard_size": "the size of files is that of transformers",
    "precision": _to("trainer.precision dtype"),
}  # fmt: skip


def suggestion(key: str, known: Iterable[str], verb: str = "fit") -> str:
    """What to say after "no setting KEY": what it is called here, or why it is not there, or what was meant.

    Args:
        key: as it was given, with dots.
        known: keys that this verb has.
        verb: the verb.
    """
    known = set(known)
    key = key.strip("-").replace("-", "_").removesuffix("+")
    if key in known:
        return f", {did_you_mean([key])}"
    group, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group} if group else {}
    meaning = SYNONYMS.get(name.lower()) if group not in _CLOSED_GROUPS else None
    if isinstance(meaning, str):
        return f": not supported: {meaning}"
    if meaning is not None:
        return _renamed(meaning, known, verb)
    below = {k.rpartition(".")[2]: k for k in known if group and k.startswith(f"{group}.")}
    if close := _closest(name, below | beside):
        return f", {did_you_mean([close])}"
    if group in _CLOSED_GROUPS:
        return _members(group, beside)
    if same := sorted(k for k in known if k.rpartition(".")[2] == name):
        return f", {did_you_mean(same)}"
    groups = {k.rpartition(".")[0] for k in known} - {""}
    if not beside and group and (close := _closest(group, {k: k for k in groups})):
        return f", {did_you_mean([f'{close}.{name}' if f'{close}.{name}' in known else close])}"
    at_large = {k.rpartition(".")[2]: k for k in sorted(known)} | {group: group for group in groups}
    if not group and (close := _closest(name, at_large)):
        return f", {did_you_mean([close])}"
    return _members(group, beside)


def _closest(name: str, candidates: dict[str, str]) -> str | None:
    close = closest(name, candidates, cutoff=_CLOSE)
    return candidates[close[0]] if close else None


def _renamed(keys: dict[str, str], known: set[str], verb: str) -> str:
    here = next((key for key in keys if key.removesuffix("+") in known), None)
    if here is None:
        return f": {next(iter(keys))!r} of lit-lora {'fit' if verb != 'fit' else 'generate'}, not of {verb}"
    return f": here it is {here!r}{f' ({keys[here]})' if keys[here] else ''}"


def _members(group: str, beside: dict[str, str]) -> str:
    return f"; {group} has {', '.join(sorted(beside))}" if 0 < len(beside) < 30 else ""
