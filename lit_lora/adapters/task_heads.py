"""What a transformers model is made for, in PEFT's words, and the head that it got for that.

A classifier made from a pretrained model begins with a random head, which no file holds. Left frozen and out of the
adapter, it would be another one after the next loading. PEFT trains it in full and stores it if it is told the task;
here the model's class tells it. PEFT goes by two or three names, which miss heads in several parts or called otherwise:
here a head is all that lies outside of the pretrained model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from lit_lora.adapters.module_names import uncompiled

_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
"""End of a class's name -> PEFT's task, and the modules that PEFT then trains in full (``peft_model.py``)."""


def task_heads(model: nn.Module) -> list[str]:
    """Names of the modules that a classifier of transformers has beside its pretrained model; none for other models."""
    pretrained = as_pretrained(model)
    if pretrained is None or not any(_CLASSIFIER.search(name) for name in _class_names(pretrained)):
        return []
    body, known = pretrained.base_model, {name for _, names in _TASKS.values() for name in names}
    return [
        name
        for name, child in pretrained.named_children()
        if child is not body and (body is not pretrained or name in known) and any(True for _ in child.parameters())
    ]


def task_type(model: nn.Module, saved: Collection[str], names: Collection[str]) -> str | None:
    """PEFT's name for the task, which makes PEFT train and look for certain modules; None where it has none.

    Args:
        model: with or without adapters.
        saved: modules that are trained in full.
        names: of all modules.
    """
    pretrained = as_pretrained(model)
    if pretrained is None:
        return None
    for end, (task, heads) in _TASKS.items():
        if any(name.endswith(end) for name in _class_names(pretrained)):
            return task if {name for name in names if name.endswith(heads)} <= set(saved) else None
    # PEFT's models for generation call the base with input_ids, which those for speech and images do not take.
    if not pretrained.can_generate() or pretrained.main_input_name != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if getattr(pretrained.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def as_pretrained(model: Any) -> Any:
    """The model if it is one of transformers, out of ``torch.compile`` if need be; else None."""
    transformers = sys.modules.get("transformers")
    model = uncompiled(model)
    return model if transformers is not None and isinstance(model, transformers.PreTrainedModel) else None


def _class_names(model: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]
