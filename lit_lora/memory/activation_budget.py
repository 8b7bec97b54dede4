"""How many layers must be recomputed so that a step's activations stay within a budget.

The model at hand runs forward once on fake tensors: its weights are only looked at for their sizes, nothing is
computed and nothing allocated. What each layer leaves alive is what it keeps for the backward pass.

With k of L layers recomputed, a step holds most at one of two moments: at the end of the forward pass (all layers that
are not recomputed, and the inputs of those that are), and while the last of the recomputed layers runs its backward
pass (the inputs, and all of one layer). Gradients in flight are counted as two hidden states and three of the layer's
widest result (attention weights, their gradient, and that of the scores). Not in the budget: the loss's buffers,
gradients of the adapters, the optimizer's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from lit_lora.base.module_state import attributes_kept
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.config import parse_bytes
from lit_lora.language_model.forward import ForwardPath, language_model_loss, placeholder_batch
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.valueless import without_values
from lit_lora.rewrites.recompute import checkpoint_layers
from lit_lora.wording import setting

_KEPT_FREE = 0.1  # of what is free, under "auto"


@dataclass(frozen=True)
class ActivationBytes:
    """What a batch keeps for the backward pass."""

    outside: int
    """Before and after the layers: embeddings, last norm, the loss's gradient of the hidden states."""
    layers: tuple[int, ...]
    """Of each layer, its output included."""
    hidden: int
    """Input of a layer: all that is kept of it if it is recomputed."""
    working: tuple[int, ...]
    """Most that is alive inside each layer's forward pass, beyond what was before it."""
    widest: int
    """Largest single result inside a layer: the gradients in flight have this size at the most."""

    def needed(self, num_recomputed: int) -> int:
        """Most activation memory of a step, with the first so many layers recomputed."""
        k = num_recomputed
        # Inputs of the recomputed layers, and of the first layer that is not.
        kept = self.outside + (k + 1 if k else 0) * self.hidden
        in_flight = 2 * self.hidden + 3 * self.widest
        forward = kept + sum(self.layers[k:]) + in_flight
        again = [kept + max(self.working[i] + 2 * self.hidden, self.layers[i] + in_flight) for i in range(k)]
        return max([forward, *again])


class ActivationBudget:
    """Lets a model recompute as many layers as the largest batch so far needs.

    Args:
        model: with adapters, no layer recomputed yet.
        amount: "4GiB", or "auto" for what is free when the first batch comes.
        path: how batches are run.
    """

    def __init__(self, model: PreTrainedModel, amount: str, path: ForwardPath) -> None:
        self.num_layers = 0
        """Layers that are recomputed now."""
        self._model = model
        self._amount = amount
        self._path = path
        self._budget: int | None = None
        self._largest = 0
        self._forwards = [layer.forward for layer in repeated_layers(model)]

    def prepare(self, num_tokens: int) -> None:
        """Before a batch of so many tokens; does nothing for one that is no larger than an earlier one.

        Raises:
            ValueError: if the batch does not fit even with all layers recomputed.
        """
        if num_tokens <= self._largest:
            return
        self._largest = num_tokens
        if self._budget is None:
            trainable = sum(p.nbytes for p in self._model.parameters() if p.requires_grad)
            device = next(self._model.parameters()).device
            self._budget = budget_bytes(self._amount, device, 3 * trainable)  # gradients, and two moments
        for layer, forward in zip(repeated_layers(self._model), self._forwards, strict=True):
            layer.forward = forward
        self.num_layers = layers_to_checkpoint(self._model, num_tokens, self._budget, self._path)
        checkpoint_layers(self._model, self.num_layers)


def layers_to_checkpoint(
    model: PreTrainedModel, batch_tokens: int, budget_bytes: int, path: ForwardPath | None = None
) -> int:
    """The smallest number of layers to recompute for activations within the budget.

    Args:
        model: with adapters, no layer recomputed yet.
        batch_tokens: tokens of the largest batch.
        budget_bytes: for activations alone.
        path: how batches are run; by default packed, with the loss from hidden states.

    Raises:
        ValueError: if even all layers recomputed are not enough, saying what is needed.
    """
    measured = measure_activations(model, batch_tokens, path)
    count = len(measured.layers)
    for k in range(count + 1):
        if measured.needed(k) <= budget_bytes:
            return k
    raise ValueError(
        f"activations of {batch_tokens} tokens need {measured.needed(count) / 1e6:,.0f} MB with all {count} layers "
        f"recomputed, {setting('model.step.recompute')} allows {budget_bytes / 1e6:,.0f} MB: raise it, or lower "
        f"{setting('data.batch_size')}, {setting('data.max_length')} or {setting('data.max_tokens_per_batch')}"
    )


def measure_activations(model: PreTrainedModel, batch_tokens: int, path: ForwardPath | None = None) -> ActivationBytes:
    """Run the model forward on fake tensors, and see what each layer leaves alive."""
    path = path or ForwardPath(packed=True, direct_head=True, reason="")
    path = replace(path, shared_prefix=False)  # the most that a batch of this size can need
    layers = repeated_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no list of equal layers: set {setting('model.step.recompute', False)}"
        )
    before: list[int] = []
    after: list[int] = []
    hidden_bytes = 0
    first_event: list[int] = []
    working: list[int] = []
    widest = 0
    tracker = StorageTracker(outputs_only=True)

    def enter(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal hidden_bytes
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        hidden_bytes = max(hidden_bytes, hidden.untyped_storage().nbytes())
        before.append(tracker.alive_bytes)
        first_event.append(len(tracker.events))

    def leave(*_: object) -> None:
        nonlocal widest
        after.append(tracker.alive_bytes)
        total = most = 0
        for event in tracker.events[first_event[-1] :]:
            total += event.num_bytes
            most, widest = max(most, total), max(widest, event.num_bytes)
        working.append(most)

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    device = next(model.parameters()).device
    piece = path.packed_up_to or batch_tokens  # a longer example would be padded
    lengths = [min(piece, batch_tokens - start) for start in range(0, batch_tokens, piece)]
    try:
        with attributes_kept(model), without_values("set recompute to true in place of an amount") as mode:
            batch = placeholder_batch(lengths, packed=path.packed, device=device)
            # The mode makes a fake twin of each real tensor that it meets. Twins of weights are no activations.
            twins = [mode.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())]
            with tracker:
                tracker.add(twins)
                start = tracker.alive_bytes
                loss = language_model_loss(model, batch, path).nll_sum
                total = tracker.alive_bytes - start
            del loss, twins
    finally:
        torch.clear_autocast_cache()  # which now may hold fake twins of the weights
        for handle in handles:
            handle.remove()
    kept = [stop - start for start, stop in zip(before, after, strict=True)]
    return ActivationBytes(total - sum(kept), tuple(kept), hidden_bytes, tuple(working), widest)


def budget_bytes(amount: str, device: torch.device, reserved: int) -> int:
    """Bytes that ``recompute`` allows; "auto" is what is free now.

    Args:
        amount: "2GiB", or "auto".
        device: where the model is.
        reserved: bytes that gradients and optimizer state still need.
    """
    if amount != "auto":
        return parse_bytes(amount)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(0, int(free * (1 - _KEPT_FREE)) - reserved)
