"""Rows of an embedding that are trained in full, and the same rows of a head: PEFT's ``trainable_token_indices``.

The rows replace those of the frozen weight, which stays as it is. Only they are stored, so that a few new tokens cost a
few kilobytes. A head whose weight is the embedding's uses the embedding's rows, and stores nothing.

Shapes: K rows that are trained, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.adapters.lora_layer import FORWARDED
from lit_lora.base.shards import device_of, is_share, whole
from lit_lora.config import LoRAConfig
from lit_lora.wording import in_words_of

DELTA = "token_adapter.trainable_tokens_delta"
"""What the rows are called below the module, as PEFT writes them: values, in spite of the name."""


class TrainableTokens(nn.Module):
    """An embedding, or a head without more to it than its weight, some rows of which are trained.

    Args:
        base_layer: frozen.
        config: as for every layer.
        token_ids: of the rows.
        tied_to: what trains the rows of the same weight elsewhere, if anything.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: LoRAConfig,
        token_ids: Sequence[int],
        *,
        tied_to: TrainableTokens | None = None,
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.config = config
        self.token_ids = list(token_ids)
        self.enabled = True
        self.original_weight: tuple[nn.Parameter] | None = None
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        device = device_of(weight)
        ids_K = torch.tensor(self.token_ids, device=device)
        self.register_buffer("ids_K", ids_K, persistent=False)
        slots_V = torch.full((len(weight),), -1, device=device)
        slots_V[ids_K] = torch.arange(len(ids_K), device=device)
        self.register_buffer("slots_V", slots_V, persistent=False)
        self._tied_to = (tied_to,)  # a tuple, to not register it a second time
        if tied_to is None:
            rows = whole(weight.detach())[ids_K].to(getattr(torch, config.adapter_dtype))
            self.token_adapter = nn.Module()
            self.token_adapter.trainable_tokens_delta = nn.Parameter(rows)

    @property
    def tied_to(self) -> TrainableTokens | None:
        """Where the rows are, if not here."""
        return self._tied_to[0]

    @property
    def rows_KD(self) -> nn.Parameter:
        """What is trained."""
        source = self.tied_to or self
        return source.token_adapter.trainable_tokens_delta  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the rows are in the base weight."""
        return self.original_weight is not None

    @property
    def weight(self) -> Tensor:
        """With the rows in place, as a head's weight is read; of a divided one outside of a pass, the frozen share."""
        weight = self.base_layer.weight
        if not self.enabled or self.merged or is_share(weight):
            return weight
        return weight.index_copy(0, self.ids_K, self.rows_KD.to(weight.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """As of the base layer with these rows."""
        out = self.base_layer(x)
        if not self.enabled or self.merged:
            return out
        if isinstance(self.base_layer, nn.Embedding):
            return self._embedded(x, out)
        rows_KD = self.rows_KD.to(x.dtype)
        bias = None if self.bias is None else self.bias[self.ids_K]
        return out.index_copy(-1, self.ids_K, F.linear(x, rows_KD, bias).to(out.dtype))

    def _embedded(self, ids: Tensor, out: Tensor) -> Tensor:
        slots = self.slots_V[ids]
        padding = self.base_layer.padding_idx
        # As the base: a padding token gets no gradient.
        padding = self.token_ids.index(padding) if padding in self.token_ids else None
        rows = F.embedding(slots.clamp(min=0), self.rows_KD, padding_idx=padding)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma scales inside its embedding layer
        rows = rows if scale is None else rows * scale
        return torch.where((slots >= 0).unsqueeze(-1), rows.to(out.dtype), out)

    @torch.no_grad()
    def merge_rows(self) -> None:
        """Put the rows into a new weight of the base, which a tied head shares with its embedding."""
        if self.tied_to is not None and self.tied_to.merged:
            merged = self.tied_to.base_layer.weight
        else:
            merged = nn.Parameter(self.weight, requires_grad=False)
        self.original_weight = (self.base_layer.weight,)
        self.base_layer.weight = merged

    def restore_rows(self) -> None:
        """Take :meth:`merge_rows` back."""
        if self.original_weight is not None:
            device, (original,) = self.base_layer.weight.device, self.original_weight
            self.base_layer.weight = (
                original if original.device == device else nn.Parameter(original.to(device), requires_grad=False)
            )
            self.original_weight = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "token_adapter"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' tie_weights assigns the weight: that concerns the frozen one.
        if name in FORWARDED:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)


def token_modules(
    modules: dict[str, nn.Module], wanted: dict[str, list[int]], *, tied: bool
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Module -> ids of the rows to train; and tied head -> the module that has its rows.

    Args:
        modules: of the model, by name.
        wanted: name, or end of one -> ids.
        tied: whether modules with one weight stay tied where they are given the same ids.

    Raises:
        ValueError: if a name matches nothing, or a module or an id cannot be served.
    """
    found: dict[str, list[int]] = {}
    for entry, ids in wanted.items():
        names = [name for name in modules if name == entry or name.endswith(f".{entry}")]
        if not names:
            raise ValueError(
                f"trainable_token_indices: {entry!r} matches no module; embeddings are "
                f"{', '.join(n for n, m in modules.items() if isinstance(m, nn.Embedding)) or 'not there'}"
            )
        found |= dict.fromkeys(names, ids)
    for name, ids in found.items():
        module = modules[name]
        plain = isinstance(module, nn.Embedding) or type(module) is nn.Linear
        if not plain:
            raise ValueError(
                f"trainable_token_indices: {name} is a {type(module).__name__}; rows of nn.Embedding and nn.Linear in "
                "full precision can be trained"
            )
        rows = len(module.weight)  # type: ignore[arg-type]
        beyond = [i for i in ids if not 0 <= i < rows]
        if beyond:
            raise ValueError(
                f"trainable_token_indices: {name} has no rows {beyond[:5]}, only 0 to {rows - 1}. "
                + in_words_of(
                    python=f"Call model.resize_token_embeddings({max(ids) + 1}) first",
                    command_line="Tokens that the tokenizer does not have yet are added by --data.new_tokens",
                )
            )
    ties: dict[str, str] = {}
    sources = {id(modules[name].weight): name for name in reversed(found) if isinstance(modules[name], nn.Embedding)}
    for name, module in modules.items():
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            continue
        source = sources.get(id(module.weight))
        if source is not None and source != name and tied and found.get(name, found[source]) == found[source]:
            ties[name] = source
            found.pop(name, None)
    return found, ties
