"""One architecture: our loss and gradients against the model's own forward pass.

The reference is the model as transformers runs it: each example alone, without padding, with its own attention, its own
loss where that is the one of next tokens, and adapters computed by plain operations. Ours is what ``fit`` does: the
path that ``choose_path`` finds, fused adapters and rotary positions, recomputed MLPs and layers, on packed and padded
batches and on a single example.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from lit_lora import LoRAConfig, LoRALightningModule, StepConfig, inject_lora
from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.language_model.forward import ForwardPath, laid_out, language_model_loss
from lit_lora.language_model.trial import choose_path
from lit_lora.module import LossOutput
from lit_lora.rewrites.fused_elementwise import fuse_elementwise
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.sweep.configs import VOCAB, tiny_config

LENGTHS = (29, 41, 12)
"""Tokens of the examples: longer than every window and chunk."""
LORA = LoRAConfig(r=4, init_lora_weights=False)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 3e-3

Examples = Sequence[tuple[Tensor, Tensor]]
"""Token ids and supervised mask of each."""


@dataclass(frozen=True)
class Result:
    """What became of an architecture."""

    model_class: str
    status: str
    """equal, different, refused (by us, with a reason), or not built (transformers cannot run a tiny one on text)."""
    path: ForwardPath | None = None
    """How our batches were run; None for a model with a loss of its own."""
    why: str = ""
    """Of what was refused or not built."""
    loss: float = 0.0
    """Largest relative difference of the loss."""
    gradients: float = 0.0
    """Largest relative difference of the adapters' gradients, all of them together."""


@dataclass(frozen=True)
class Run:
    loss: Tensor
    gradients: dict[str, Tensor]

    def differences(self, expected: Run) -> tuple[float, float]:
        assert self.gradients.keys() == expected.gradients.keys()
        pairs = [(self.gradients[name], gradient) for name, gradient in expected.gradients.items()]
        distance = torch.stack([(got - gradient).norm() for got, gradient in pairs]).norm()
        size = torch.stack([gradient.norm() for _, gradient in pairs]).norm()
        return float((self.loss - expected.loss).abs() / expected.loss.abs()), float(distance / size)


def compare(model_type: str, *, seq2seq: bool = False, alone: bool = True, **fields: Any) -> Result:
    """Build an architecture small, and compare.

    Args:
        model_type: key of the mapping of ``AutoModelForCausalLM``.
        seq2seq: of ``AutoModelForSeq2SeqLM`` instead.
        alone: compare packed examples with each alone; else with a padded batch of them, for a model whose rotary
            frequencies depend on the longest of a batch.
        fields: of the config.
    """
    try:
        model = build(model_type, seq2seq=seq2seq, **fields)
    except Exception as error:  # of any kind: a default config of transformers that it cannot build small
        return Result("", "not built", why=_first_line(error))
    name = type(model).__name__
    path = None
    try:
        if model.config.is_encoder_decoder:
            differences = [_compare_encoder_decoder(model)]
        else:
            path, differences = _compare_causal(model, alone)
    except _NotRun as error:
        return Result(name, "not built", why=str(error))
    except ValueError as error:
        return Result(name, "refused", why=_first_line(error))
    loss, gradients = (max(values) for values in zip(*differences, strict=True))
    equal = loss <= LOSS_TOLERANCE and gradients <= GRADIENT_TOLERANCE
    return Result(name, "equal" if equal else "different", path, "", loss, gradients)


def build(model_type: str, *, seq2seq: bool = False, **fields: Any) -> PreTrainedModel:
    """A small model with weights large enough that everything matters."""
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = auto.from_config(tiny_config(model_type, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name and parameter.is_floating_point():
                parameter.normal_(std=0.15)
    return model.train()


def _adaptable(model: PreTrainedModel) -> LoRAConfig:
    """All linear layers but those that a run refuses to adapt, left out as its message says."""
    try:
        inject_lora(copy.deepcopy(model), LORA)
    except ValueError as error:
        advice = re.search(r"set exclude_modules: (\[.*\])", str(error))
        if advice is None:
            raise
        return replace(LORA, exclude_modules=ast.literal_eval(advice[1]))
    return LORA


class _NotRun(Exception):
    """The model's own forward pass needs more than token ids."""


# ---------------------------------------------------------------------- causal language models


def _compare_causal(model: PreTrainedModel, alone: bool) -> tuple[ForwardPath, list[tuple[float, float]]]:
    before = _implementations(model)
    inject_lora(model, _adaptable(model))
    path = choose_path(model)
    examples = _examples()
    own_path = path if alone else replace(path, packed=False)
    if _draws_random_numbers(lambda: _own_run(model, examples, own_path)):
        model.eval()
    expected = _own_run(model, examples, own_path)
    found = [
        _our_run(model, examples, path, collate).differences(expected) for collate in (collate_packed, collate_padded)
    ]
    single = _our_run(model, examples[:1], path, collate_packed)
    found.append(single.differences(_own_run(model, examples[:1], path)))
    recompute_gated_mlps(model)
    fuse_elementwise(model)
    if repeated_layers(model):
        checkpoint_layers(model)
    found.append(_our_run(model, examples, path, collate_packed).differences(expected))
    assert _implementations(model) == before, "the model's own attention was not given back"
    return path, found


def _examples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        mask = torch.rand(length, generator=generator) < 0.6
        mask[0], mask[-1] = False, True
        made.append((torch.randint(VOCAB, (length,), generator=generator), mask))
    return made


def _own_run(model: PreTrainedModel, examples: Examples, path: ForwardPath) -> Run:
    """Each example alone; padded in one batch where ours is, since some models see the padding."""
    batch = laid_out(collate_packed(_tokenized(examples)), path)
    rows = [(ids[None], torch.where(mask, ids, -100)[None], None) for ids, mask in examples]
    if "attention_mask" in batch:
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[batch["target_positions"] + 1] = batch["target_ids"]
        rows = [(batch["input_ids"], labels, batch["attention_mask"])]

    def loss() -> Tensor:
        total = torch.zeros(())
        for ids, labels, mask in rows:
            output = _own_output(model, ids, labels, mask)
            if output.loss is not None and not path.other_loss:
                total = total + output.loss * (labels != -100).sum()
            else:
                logits, targets = output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
                total = total + F.cross_entropy(logits, targets, reduction="sum")
        return total

    with _plain_adapters(model):
        return _run(model, loss)


def _own_output(model: PreTrainedModel, ids: Tensor, labels: Tensor, mask: Tensor | None) -> Any:
    try:
        return model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False)
    except ValueError:  # it has another use for labels
        return model(input_ids=ids, attention_mask=mask, use_cache=False)


def _tokenized(examples: Examples) -> list[TokenizedExample]:
    return [TokenizedExample(i, ids.int().numpy(), mask.numpy()) for i, (ids, mask) in enumerate(examples)]


def _our_run(model: PreTrainedModel, examples: Examples, path: ForwardPath, collate: Callable[..., Any]) -> Run:
    return _run(model, lambda: language_model_loss(model, collate(_tokenized(examples)), path).nll_sum)


# ---------------------------------------------------------------------- encoder-decoders


class _OwnLoss(LoRALightningModule):
    """The two hooks, as a user of another model overrides them."""

    def __init__(self, built: PreTrainedModel) -> None:
        super().__init__("", lora=_adaptable(built), step=StepConfig(recompute=bool(repeated_layers(built))))
        self._built = [built]

    def load_base(self) -> nn.Module:
        return self._built[0]

    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        count = int((batch["labels"] != -100).sum())
        return LossOutput(self.forward(**batch).loss * count, count, None)


def _compare_encoder_decoder(model: PreTrainedModel) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(3, VOCAB, (2, 29), generator=generator),
        "attention_mask": (torch.arange(29) < torch.tensor([[29], [17]])).long(),
        "labels": torch.randint(3, VOCAB, (2, 29), generator=generator),
    }
    try:
        model(**batch)
    except Exception as error:
        raise _NotRun(_first_line(error)) from error
    module = _OwnLoss(copy.deepcopy(model))
    torch.manual_seed(2)
    module.configure_model()
    assert module.path is None, "the trial of next tokens has run on a model with a loss of its own"
    torch.manual_seed(2)
    inject_lora(model, module.lora)

    def own_loss() -> Tensor:
        return model(**batch).loss * batch["labels"].numel()

    if _draws_random_numbers(own_loss):
        model.eval(), module.eval()
    with _plain_adapters(model):
        expected = _run(model, own_loss)
    assert module.model is not None
    ours = _run(module.model, lambda: module.compute_loss(batch).loss_sum)
    return ours.differences(expected)


# ---------------------------------------------------------------------- both


def _run(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    model.zero_grad()
    value = loss()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(value.detach(), gradients)


@contextmanager
def _plain_adapters(model: nn.Module) -> Iterator[None]:
    layers = [layer for _, layer in lora_layers(model) if isinstance(layer, LoRALinear)]
    fast = [layer.has_fast_path for layer in layers]
    for layer in layers:
        layer.has_fast_path = False
    try:
        yield
    finally:
        for layer, had in zip(layers, fast, strict=True):
            layer.has_fast_path = had


def _draws_random_numbers(function: Callable[[], Any]) -> bool:
    before = torch.get_rng_state()
    function()
    return not torch.equal(torch.get_rng_state(), before)


def _implementations(model: PreTrainedModel) -> list[str | None]:
    return [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}"[:200]
