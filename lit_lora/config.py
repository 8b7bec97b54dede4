"""What the user may set, grouped by consequence: frozen dataclasses, checked on construction.

What is adapted (``LoRAConfig``), how the base is held (``QuantizationConfig``), what is learned
(``OptimizationConfig``), and at what cost (``StepConfig``).

Field names of adapters are PEFT's, so that a config reads the same in ``adapter_config.json``, in YAML and in Python.
Left out on purpose: fields of PEFT that change the function and that lit_lora does not implement
(``layer_replication``, ...). Reading an adapter that uses one of them is an error, see ``interchange/peft_format.py``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from lit_lora.files.plain_fields import convert_fields

OF_THE_WEIGHT = ("pissa", "pissa_niter_4", "pissa_niter_16", "olora", "corda")
"""Ways to start A and B as a part of the weight."""

LATER_STARTS = ("eva", "corda", "loftq")
"""Ways to start A and B that need more than the layer: batches, or what the weight was before it was quantized."""

Start = Literal["gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "corda", "eva", "loftq"]

Combination = Literal[
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
"""Ways to make one adapter of several."""


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get a low-rank adapter, and of what rank and scale."""

    r: int = 8
    """Rank of the adapters."""

    lora_alpha: float = 16
    """Numerator of the scale: the adapter's output is multiplied by ``lora_alpha / r``."""

    lora_dropout: float = 0.0
    """Dropout probability on the adapter's input, in [0, 1)."""

    target_modules: list[str] | str = "all-linear"
    """Layers to adapt: names (exact or the last part of the path), one regular expression for the full path, or
    "all-linear" for every linear layer but the output head."""

    exclude_modules: list[str] | str | None = None
    """Layers to leave out although ``target_modules`` matches them: names, or one regular expression."""

    target_parameters: list[str] | None = None
    """Parameters to adapt that no linear layer holds, such as the fused experts of a mixture: names, exact or the
    last parts of the path (experts.gate_up_proj, experts.down_proj)."""

    modules_to_save: list[str] | None = None
    """Modules to train in full and to store with the adapter, by name. The head of a classifier of transformers is
    trained so in any case, unless it is excluded."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding to train in full, by token id, and those of a tied head; or name of an embedding or a
    head -> ids."""

    ensure_weight_tying: bool = False
    """Where an embedding or a head that share one weight are trained in full, train both as one."""

    layers_to_transform: list[int] | int | None = None
    """Only adapt decoder layers with these indices. A layer that is targeted by its full name is adapted anyway."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that ``layers_to_transform`` counts in, where it is not the first numbered one, or
    lies at the top of the model."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from ``r``: name or regular expression for the end of a path -> rank. Of several that match,
    the first one counts. An expert of a fused parameter is named by its number (experts.down_proj.3)."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from ``lora_alpha``: name or regular expression for the end of a path -> alpha."""

    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)`` (rank-stabilised LoRA, arXiv:2312.03732, eq. 3)."""

    use_dora: bool = False
    """Also train the length of each row of an adapted weight (DoRA, arXiv:2402.09353): one more pass over the weight in
    each forward, for their norms."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base to train along: none, all, or those of adapted layers (lora_only)."""

    lora_bias: bool = False
    """Give B of each adapted layer a bias, which is scaled as the product is. Merging adds it to the bias of the layer,
    which has to have one for that."""

    init_lora_weights: bool | Start = True
    """How A and B start: true (Kaiming-uniform A, zero B), "gaussian" (normal A, zero B), or false (both random, for
    tests). Linear layers also "orthogonal" (neither is zero, and their product is; even rank), "pissa" (the largest
    singular values of the weight; with _niter_4 or _niter_16 a faster estimate of them), "olora" (the beginning of its
    QR) and "corda" (what of the weight acts most on the first batches); what these three start as is taken off again,
    and the base stays as it was, at the cost of twice the rank. Also "eva" (A as the principal components of what comes
    in from the first batches, zero B) and, with quantization, "loftq" (most of what quantization took)."""

    eva_rho: float = 1.0
    """With "eva", how far ranks may go to where inputs vary most (PEFT's ``EvaConfig.rho``): a layer gets from 0 to
    ``eva_rho`` times its rank, and their sum stays. 1 leaves ranks as they are set."""

    freeze_A: bool = False
    """Leave A as it starts and train B alone (LoRA-FA, arXiv:2308.03303): half the parameters to optimize. The built-in
    AdamW then turns the gradient of B to that of the whole weight, as PEFT's LoRA-FA optimizer. For linear layers."""

    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the adapter's parameters. float32 unless memory forces otherwise: half precision loses small updates. On
    CUDA products are in the base's half precision all the same, with sums and gradients in float32."""

    def __post_init__(self) -> None:
        convert_fields(self)
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        trained = self.modules_to_save or self.target_parameters or self.trainable_token_indices
        if not self.target_modules and not trained:
            raise ValueError("target_modules is empty: name the layers to adapt, or use 'all-linear'")
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                "lora_dropout must be 0 with target_parameters: in PEFT's format these adapters are added to the "
                "parameter, where there is no input to drop from"
            )
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern[{pattern!r}] must be at least 1, got {rank}")
        if self.init_lora_weights == "orthogonal" and (
            odd := [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        ):
            raise ValueError(
                f"init_lora_weights 'orthogonal' needs even ranks, got {odd[0]}: halves of A and B are paired"
            )
        if self.eva_rho < 1:
            raise ValueError(f"eva_rho must be a number from 1 on, got {self.eva_rho}")
        if self.eva_rho > 1 and self.init_lora_weights != "eva":
            raise ValueError(
                f"eva_rho has no effect with init_lora_weights {self.init_lora_weights!r}: it is for 'eva'"
            )
        if self.use_dora and self.init_lora_weights in OF_THE_WEIGHT:
            raise ValueError(
                f"use_dora does not work with init_lora_weights {self.init_lora_weights!r}: its lengths would be those "
                "of a weight without its largest part. Set one of them"
            )
        if self.target_parameters and self.use_dora:
            raise ValueError("use_dora does not work with target_parameters, in PEFT either: set one of them")
        if self.lora_bias:
            self._check_lora_bias()
        for name, ids in self.rows_to_train("the embedding").items():
            if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
                raise ValueError(f"trainable_token_indices must be different ids from 0 on, got {ids} for {name}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: set both or neither")

    def _check_lora_bias(self) -> None:
        """What PEFT refuses beside it: an adapter has to be read by it."""
        beside = {
            f"init_lora_weights {self.init_lora_weights!r}": not isinstance(self.init_lora_weights, bool),
            "use_dora": self.use_dora,
            "target_parameters": bool(self.target_parameters),
        }
        for what, is_set in beside.items():
            if is_set:
                raise ValueError(f"lora_bias does not work with {what}, in PEFT either: set one of them")

    def rows_to_train(self, embedding: str) -> dict[str, list[int]]:
        """Module -> ids of ``trainable_token_indices``; a list is for the one named ``embedding``."""
        rows = self.trainable_token_indices
        return rows if isinstance(rows, dict) else {embedding: rows} if rows is not None else {}

    @property
    def vocabulary_rows(self) -> int:
        """Rows that a vocabulary has at least to hold the tokens of ``trainable_token_indices``."""
        return 1 + max((i for ids in self.rows_to_train("").values() for i in ids), default=-1)

    def check_for_training(self) -> None:
        """Adapters that others trained may have any scale; what is to be trained needs one above zero.

        Raises:
            ValueError: naming the field.
        """
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha <= 0:
                raise ValueError(f"{name} must be above 0 to train, got {alpha}: it is the numerator of the scale")

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Factor on ``B @ A`` for a layer of this rank and alpha."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base is quantized (QLoRA, arXiv:2305.14314). Adapters stay in full precision."""

    bits: Literal[4, 8] = 4
    """Bits per weight: 4 (NF4 or FP4, blockwise) or 8 (LLM.int8)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""

    double_quant: bool = True
    """Quantize the blocks' scales too: saves about 0.37 bits per weight (4 bits only)."""

    block_size: int = 64
    """Weights that share one scale (4 bits only)."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype that weights are dequantized to for a product. auto: that of the base's other weights."""

    skip_modules: list[str] | None = None
    """Modules to keep in full precision, by name; the output head always is, unless ``embedding_bits`` is set."""

    embedding_bits: Literal[8] | None = None
    """Also keep the embedding and the output head in 8 bits: with a large vocabulary they are half of a small model."""

    def __post_init__(self) -> None:
        convert_fields(self)
        if not 32 <= self.block_size <= 4096 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two from 32 to 4096, got {self.block_size}")
        if self.bits == 8 and (self.quant_type != "nf4" or not self.double_quant or self.block_size != 64):
            raise ValueError("quant_type, double_quant and block_size only apply to 4 bits: leave them out")


@dataclass(frozen=True)
class OptimizationConfig:
    """What is learned: AdamW, and a learning rate that rises and then comes down."""

    learning_rate: float = 2e-4
    """Peak learning rate of the built-in AdamW."""

    weight_decay: float = 0.0
    """Weight decay of the built-in AdamW."""

    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up, per optimizer step."""

    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises, in [0, 1)."""

    lora_plus_ratio: float = 1.0
    """Learning rate of B, of biases and of other vectors, as a multiple of the rest's (LoRA+, arXiv:2402.12354, which
    recommends about 16 at a lower rate; an embedding's B learns at the rest's). With the built-in AdamW."""

    def __post_init__(self) -> None:
        convert_fields(self)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"lora_plus_ratio must be above 0, got {self.lora_plus_ratio}: 1 is one rate for all")

    def check_beside_own_optimizer(self) -> None:
        """Refuse what an optimizer of one's own does not hear of.

        Raises:
            ValueError: naming the field.
        """
        if self.weight_decay:
            raise ValueError("weight_decay has no effect on an optimizer of your own: set it there")
        if self.lora_plus_ratio != 1:
            raise ValueError("lora_plus_ratio has no effect on an optimizer of your own: leave it at 1")


@dataclass(frozen=True)
class StepConfig:
    """How a step is computed: at another cost in time and memory, with the same result. A resumed run may change it."""

    recompute: bool | int | str = False
    """Decoder layers to recompute in the backward pass, for less memory and more time: false for none, true for all, a
    number for that many from the first, an amount such as 4GiB for as few as keep activations within it, or "auto" for
    what is free on the device."""

    recompute_mlp: bool = True
    """Recompute SwiGLU's activation and product in the backward pass: saves half of a layer's activations for two
    elementwise passes."""

    shared_prefix: bool = True
    """Compute what all examples of a packed batch begin with once; on a CPU, without dropout."""

    chunked_loss: bool = True
    """Compute the loss from hidden states in chunks, where that is exact; else from full logits."""

    fused_lora: bool = True
    """One autograd function per adapted layer; else plain operations, for comparison."""

    fused_kernels: bool = True
    """In half precision, one kernel for each norm, rotary position and SwiGLU (a few rows at a time on a CPU), and
    layers with the same input computed together; in float32 on a CPU for rotary positions alone. Under
    ``compile_layers`` the compiler sees to that."""

    cuda_graphs: bool | Literal["auto"] = "auto"
    """On one GPU, record forward and backward pass as CUDA graphs: what the host launched kernel by kernel is launched
    at once. Packed batches are rounded up to few shapes, by an eighth at most, with tokens that count nothing. "auto"
    does where no layer is recomputed, since graphs take memory; true, with those too. Not with compiled layers, dropout
    in recomputed ones, or padded batches."""

    compile_layers: bool = False
    """Run each decoder layer through torch.compile, for longer runs on CUDA. No gain on a CPU, nor for a 135M model on
    an H200, where the first steps waited a minute for the compiler."""

    liger: bool = False
    """Liger's kernels for norms, rotary positions and gated MLPs; CUDA only."""

    def __post_init__(self) -> None:
        convert_fields(self)
        if isinstance(self.recompute, str):
            if self.recompute != "auto":
                parse_bytes(self.recompute)
        elif self.recompute < 0:
            raise ValueError(f"recompute must be at least 0 layers, got {self.recompute}")
        if self.liger and self.compile_layers:
            raise ValueError(
                "liger and compile_layers fuse the same operations, and together they are untested: set one of them"
            )
        if self.liger and self.activation_budget is not None:
            raise ValueError(
                f"recompute {self.recompute!r} traces the model on tensors without values, which Liger's kernels "
                "cannot: set recompute to true, or liger to false"
            )

    @property
    def activation_budget(self) -> str | None:
        """Memory that ``recompute`` is to keep activations within, if it is that."""
        return self.recompute if isinstance(self.recompute, str) else None

    @property
    def recomputed_layers(self) -> int | None:
        """How many decoder layers are recomputed from the start; None for all."""
        if isinstance(self.recompute, str):
            return 0
        return None if self.recompute is True else int(self.recompute)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: int | str) -> int:
    """Bytes in an amount of memory as people write it: "12GB" (10^9), "8GiB" (2^30), "512 MB" or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected an amount of memory such as 12GB or 8GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
