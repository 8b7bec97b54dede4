"""Runs of a trial: a few short examples in several layouts, and what is compared of them.

Shapes: N examples, L padded length, T tokens of all examples, R rows of a layout, S target positions, D hidden,
V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lit_lora.adapters.frozen_statistics import keep_batch_norm_frozen
from lit_lora.base.int8_rows import Int8Head
from lit_lora.base.module_state import attributes_kept
from lit_lora.base.shards import device_of, device_of_model, recover_
from lit_lora.base.whose_error import ask
from lit_lora.kernels.linear_cross_entropy import IGNORE_INDEX
from lit_lora.language_model.forward import (
    Batch,
    ForwardPath,
    language_model_loss,
    placeholder_batch,
    target_logits,
    unpack,
)
from lit_lora.language_model.shared_prefix import share_prefix

SHARED = 4
"""Tokens that the examples have in common; what follows them is predicted."""

_LOWEST = -50.0
"""Log-probability at which logits that are masked with minus infinity, or nearly, are cut off."""


class TrialBatch(NamedTuple):
    """The same examples in every layout."""

    lengths: tuple[int, ...]
    layouts: dict[str, Batch]
    """packed, padded, shared."""

    @property
    def labels(self) -> Tensor:
        """As transformers' models take them, for the padded layout, ``(N, L)``."""
        padded = self.layouts["padded"]
        labels_NL = torch.full_like(padded["input_ids"], IGNORE_INDEX)
        labels_NL.view(-1)[padded["target_positions"] + 1] = padded["target_ids"]
        return labels_NL

    def rows(self, layout: str) -> Tensor:
        """Where each token is in the rows of a layout, ``(T,)``."""
        packed, batch = self.layouts["packed"], self.layouts[layout]
        positions_T = packed["position_ids"].squeeze(0)
        example_T = torch.repeat_interleave(torch.tensor(self.lengths)).to(positions_T.device)
        if layout == "padded":
            return example_T * batch["input_ids"].shape[1] + positions_T
        prefix = batch.get("shared_prefix", 0)
        own = batch["seq_lens"][1:] if prefix else batch["seq_lens"]
        starts = torch.tensor([prefix, *accumulate(own[:-1], initial=prefix)][1:]).to(positions_T.device)
        return torch.where(positions_T < prefix, positions_T, starts[example_T] + positions_T - prefix)

    @property
    def swapped(self) -> TrialBatch:
        """The same examples in rows that have changed places, padded."""
        ids_NL, mask_NL = self.layouts["padded"]["input_ids"], self.layouts["padded"]["attention_mask"]
        rows: Batch = {"input_ids": ids_NL.flip(0), "attention_mask": mask_NL.flip(0)}
        return TrialBatch(self.lengths[::-1], {"padded": rows})


def trial_batch(model: PreTrainedModel, lengths: tuple[int, ...], *, special: bool) -> TrialBatch:
    """Examples of these lengths, with a common beginning.

    Args:
        model: tells the vocabulary and the device.
        lengths: tokens of each example.
        special: among them the ids that the config names, and the first and last of the vocabulary.
    """
    embedding: Any = model.get_input_embeddings()
    vocab, named = model.config.get_text_config().vocab_size, named_ids(model)
    plain = (token for i in count() if (token := (7 * i + 3) % vocab) not in named)
    beginning = [*islice(plain, SHARED)]
    examples: list[list[int]] = []
    for length in lengths:
        own = [*islice(plain, length - SHARED)]
        if special and not examples:
            own = [*named, *own][: length - SHARED]
        examples.append([*beginning, *own])
    ids_T = [token for example in examples for token in example]
    starts = [0, *accumulate(lengths)]
    positions_S = [start + i for start, length in zip(starts, lengths, strict=False) for i in range(SHARED, length - 1)]
    device = device_of(embedding.weight)
    integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
    packed: Batch = {
        "input_ids": torch.tensor([ids_T], **integers),
        "position_ids": torch.tensor([[i for length in lengths for i in range(length)]], **integers),
        "cu_seq_lens": torch.tensor(starts, dtype=torch.int32, device=device),
        "seq_lens": list(lengths),
        "target_positions": torch.tensor(positions_S, **integers),
        "target_ids": torch.tensor([ids_T[i + 1] for i in positions_S], **integers),
    }
    shared = share_prefix(packed, min_saved=1) if device.type == "cpu" else packed
    return TrialBatch(lengths, {"shared": shared, "packed": packed, "padded": unpack(packed)})


def placeholder_trial(model: PreTrainedModel, lengths: tuple[int, ...]) -> TrialBatch:
    """Examples of these lengths without content, for a model whose tensors have no values."""
    device: Any = device_of_model(model.get_input_embeddings())
    layouts = {
        layout: placeholder_batch(lengths, packed=layout == "packed", device=device) for layout in ("packed", "padded")
    }
    return TrialBatch(lengths, layouts)


def named_ids(model: PreTrainedModel) -> list[int]:
    """Token ids that a config names, such as those of images, and the first and last of the vocabulary."""
    vocab = model.config.get_text_config().vocab_size
    found: list[Any] = [vocab - 1, 0]
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                found += value if isinstance(value, (list, tuple)) else [value]
    return [*dict.fromkeys(token for token in found if type(token) is int and 0 <= token < vocab)]


# ---------------------------------------------------------------------- the general way


class GeneralRun(NamedTuple):
    """What the model gives, padded and with its own logits, in evaluation mode."""

    logits_NLV: Tensor
    own_loss: float | None
    """Mean over target tokens, as the model itself computes it, if it does."""
    why_not_direct: str
    """Why the loss cannot be computed from the decoder's output and the head's weight; empty if it can."""


@torch.no_grad()
def run_general(model: PreTrainedModel, batch: TrialBatch, *, labelled: bool) -> GeneralRun:
    """The model's own forward pass, with labels or without, watched between decoder and head."""
    padded = batch.layouts["padded"]
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
    if labelled:
        inputs["labels"] = batch.labels
    with _HeadWatch(model) as watch:
        output = ask(model, **inputs, use_cache=False)
    loss = output.loss.item() if labelled and output.loss is not None else None
    return GeneralRun(output.logits, loss, watch.why_not_direct(output.logits))


class _HeadWatch:
    """Sees what goes from the decoder to the head, and from there."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen: dict[str, list[tuple[Any, int]]] = {"hidden": [], "head_input": [], "head_output": []}

    def __enter__(self) -> _HeadWatch:
        decoder, head = self._decoder(), self._model.get_output_embeddings()
        self._handles = [
            head.register_forward_pre_hook(lambda _, args: self._see("head_input", args[0])),
            head.register_forward_hook(lambda _, args, output: self._see("head_output", output)),
        ]
        if decoder is not None:
            hook = decoder.register_forward_hook(lambda _, args, output: self._see("hidden", output[0]))
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _decoder(self) -> Any:
        decoder = self._model.get_decoder() if hasattr(self._model, "get_decoder") else None
        return None if decoder is self._model else decoder

    def _see(self, what: str, tensor: Any) -> None:
        self._seen[what].append((tensor, tensor._version))

    def why_not_direct(self, logits: Tensor) -> str:
        head = self._model.get_output_embeddings()
        if type(head) not in (nn.Linear, Int8Head):
            return f"the output head is a {type(head).__name__}"
        if isinstance(head, nn.Linear) and head.bias is not None:
            return "the output head has a bias"
        if self._decoder() is None or [len(seen) for seen in self._seen.values()] != [1, 1, 1]:
            return "the decoder cannot be run apart from the head"
        (hidden, hidden_version), (head_input, _), (head_output, version) = (s[0] for s in self._seen.values())
        if not _is_same(head_input, hidden, hidden_version) or not _is_same(logits, head_output, version):
            return "the model's logits are not its head applied to the decoder's output"
        return ""


def _is_same(tensor: Tensor, made: Tensor, version: int) -> bool:
    """Whether a tensor is one that was made before, whole and unchanged, or the same in another type."""
    if tensor.shape != made.shape or made._version != version:
        return False
    if tensor.dtype != made.dtype:
        return isinstance(tensor, FakeTensor) or torch.equal(tensor, made.to(tensor.dtype))
    return tensor.untyped_storage()._cdata == made.untyped_storage()._cdata


# ---------------------------------------------------------------------- a shorter way


class LayoutLogits(NamedTuple):
    """The model's own logits."""

    logits_RV: Tensor
    counted: bool
    """Whether positions were counted along the row, as far as that can be seen."""


@torch.no_grad()
def layout_logits(model: PreTrainedModel, batch: TrialBatch, layout: str) -> LayoutLogits:
    """Run the model on a layout, and take the logits at all of its rows."""
    laid_out = batch.layouts[layout]
    rows = torch.arange(laid_out["input_ids"].numel(), device=laid_out["input_ids"].device)
    with _CountedPositions(len(rows)) as watch:
        return LayoutLogits(target_logits(model, {**laid_out, "target_positions": rows}), watch.seen)


class LossRun(NamedTuple):
    """Loss of a trial batch, and its gradients where they are enabled."""

    loss: Tensor
    trained: list[Tensor]
    """For the trainable parameters."""
    embedded_RD: Tensor | None
    """For the embedding of each row."""
    random: bool
    """Whether random numbers were drawn, beside those of dropout."""
    dropout: bool
    """Whether dropout was asked for, and left out."""


def run_loss(model: PreTrainedModel, batch: TrialBatch, layout: str, *, direct_head: bool) -> LossRun:
    """The training loss of a layout, and its gradients; without dropout, which would be another in every run."""
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output.clone()  # a model may scale it in place

    path = ForwardPath(packed=layout != "padded", direct_head=direct_head, reason="")
    handle = model.get_input_embeddings().register_forward_hook(keep) if torch.is_grad_enabled() else None
    torch.manual_seed(0)
    before = _random_state(model)
    with _NoDropout() as noise:
        try:
            loss = language_model_loss(model, batch.layouts[layout], path).nll_sum
        finally:
            if handle is not None:
                handle.remove()
        random = not torch.equal(_random_state(model), before)
        if handle is None:
            return LossRun(loss, [], None, random, noise.asked)
        wanted = [*embedded, *(p for p in model.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    rows_RD = gradients[0].flatten(0, -2) if len(embedded) == 1 else None
    return LossRun(loss.detach(), list(gradients[len(embedded) :]), rows_RD, random, noise.asked)


def _random_state(model: PreTrainedModel) -> Tensor:
    device = device_of_model(model)
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def loss_difference(got: LossRun, layout: str, expected: LossRun, batch: TrialBatch) -> dict[str, float]:
    """How far a layout's loss and gradients are from those of the padded one, relative to these."""
    found = {"loss": float((got.loss - expected.loss).abs() / expected.loss.abs())}
    if expected.trained:
        found["gradients"] = _relative(got.trained, expected.trained)
    if got.embedded_RD is not None and expected.embedded_RD is not None:
        expected_TD = expected.embedded_RD[batch.rows("padded")]
        expected_RD = torch.zeros_like(got.embedded_RD).index_add_(0, batch.rows(layout), expected_TD)
        found["gradients of embeddings"] = _relative([got.embedded_RD], [expected_RD])
    return found


def logit_difference(got_TV: Tensor, expected_TV: Tensor) -> float:
    """The largest difference of a token's log-probabilities, relative to how far these are spread."""
    got, expected = (x.float().log_softmax(-1).clamp(min=_LOWEST) for x in (got_TV, expected_TV))
    if got.shape != expected.shape:
        return math.inf
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((got - expected).norm(dim=-1) / spread).max())


def _relative(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = torch.stack([(a - b).float().norm() for a, b in zip(got, expected, strict=True)]).norm()
    size = torch.stack([b.float().norm() for b in expected]).norm()
    return float(difference / size) if size else float(difference)


# ---------------------------------------------------------------------- around all runs


@contextmanager
def quietly(model: PreTrainedModel) -> Iterator[None]:
    """What a trial changes is undone: modes, what modules note on themselves, the random state."""
    device = device_of_model(model.get_input_embeddings())
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, attributes_kept(model):
        yield
        recover_(model)  # what a way that failed has left gathered


def set_mode(model: PreTrainedModel, training: bool) -> None:
    """Training or evaluation mode; batch norms of the frozen base stay in evaluation."""
    model.train(training)
    keep_batch_norm_frozen(model)


class _NoDropout(TorchFunctionMode):
    """Dropout does nothing but to be noticed."""

    asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            self.asked |= bool(given.get("p", 0.5)) and given.get("training", given.get("train", True))
            return given["input"]
        if func is F.scaled_dot_product_attention:
            given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
            self.asked |= bool(given.pop("dropout_p", 0.0))
            return func(**given)
        return func(*args, **kwargs)


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DROPOUTS = (F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)


class _CountedPositions(TorchFunctionMode):
    """Sees whether somebody counts up to a number of rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.arange:
            self.seen |= len(result) == self._rows
        return result
