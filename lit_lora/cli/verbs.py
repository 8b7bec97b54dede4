"""The verbs of ``lit-lora``, and what each does. Light: every start reads them."""

from __future__ import annotations

TRAINER_VERBS = {
    "fit": "fine-tune a model and prove it",
    "validate": "loss, perplexity and token accuracy on validation data",
    "test": "the same on test data",
    "predict": "write a generation for each prompt of a data file",
}
TOOLS = {
    "fetch": "download a small base model",
    "data": "what a model will see of a data file, and settings for it",
    "init": "write a config that suits a model, a data file and your memory",
    "generate": "prompt in, text out, with and without an adapter",
    "chat": "talk to a model, with its adapter or without",
    "evaluate": "scores on held-out examples, before and after",
    "estimate": "peak memory of a fit, and whether it fits",
    "report": "a page to look at, of one run or of several side by side",
    "verify": "check the files of a run, and repeat some of its steps",
    "merge": "fold an adapter into its base: a folder for plain transformers",
    "combine": "make one adapter of several",
    "compress": "write an adapter at a lower rank, and what that loses",
    "export": "write an adapter from a checkpoint or folder, for other tools",
    "push": "upload an adapter to the Hugging Face Hub, with its model card",
    "harness": "tasks of lm-evaluation-harness, before and after",
    "sweep": "a fit for each combination of some settings, side by side",
    "completion": "a script that lets bash or zsh complete all of this",
    "tiers": "five QLoRA runs, 10 steps to 7B; skips what this machine cannot run",
}
"""Verb -> help. Each is the function of that name in ``lit_lora.tools.<verb>``."""
