"""What the user may set about adapters and quantization: frozen dataclasses, checked on construction.

Field names are PEFT's, so that a config reads the same in ``adapter_config.json``, in YAML and in Python. Left out on
purpose: fields of PEFT that change the function and that lit_lora does not implement (DoRA, trainable biases, ...).
Reading an adapter that uses one of them is an error, see ``adapters/peft_format.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Literal


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

    modules_to_save: list[str] | None = None
    """Modules to train in full and to store with the adapter, by name."""

    layers_to_transform: list[int] | int | None = None
    """Only adapt decoder layers with these indices."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that ``layers_to_transform`` counts in, where it is not the first numbered one."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from ``r``: name or regular expression for the end of a path -> rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from ``lora_alpha``: name or regular expression for the end of a path -> alpha."""

    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)`` (rank-stabilised LoRA, arXiv:2312.03732, eq. 3)."""

    init_lora_weights: bool | str = True
    """How A and B start: true (Kaiming-uniform A, zero B), "gaussian" (normal A, zero B), or false (both random, for
    tests)."""

    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the adapter's parameters. float32 unless memory forces otherwise: half precision loses small updates."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be above 0 and finite, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if not self.target_modules and not self.modules_to_save:
            raise ValueError("target_modules is empty: name the layers to adapt, or use 'all-linear'")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern[{pattern!r}] must be at least 1, got {rank}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: set both or neither")

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Factor on ``B @ A`` for a layer of this rank and alpha."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base is quantized (QLoRA, arXiv:2305.14314). Adapters stay in full precision."""

    bits: Literal[4, 8] = 4
    """Bits a weight: 4 (NF4 or FP4, blockwise) or 8 (LLM.int8)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""

    double_quant: bool = True
    """Quantize the blocks' scales too: saves about 0.37 bits a weight (4 bits only)."""

    block_size: int = 64
    """Weights that share one scale (4 bits only)."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype that weights are dequantized to for a product. auto: bfloat16 on CUDA, float32 on a CPU."""

    skip_modules: list[str] | None = None
    """Modules to keep in full precision, by name; the output head always is, unless ``embedding_bits`` is set."""

    embedding_bits: Literal[8] | None = None
    """Also keep the embedding and the output head in 8 bits: with a large vocabulary they are half of a small model."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}")
        for name, known in (
            ("quant_type", ("nf4", "fp4")),
            ("double_quant", (True, False)),
            ("compute_dtype", ("auto", "float32", "bfloat16", "float16")),
            ("embedding_bits", (None, 8)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if not isinstance(self.skip_modules, (list, NoneType)):
            raise ValueError(f"skip_modules must be a list of names, got {self.skip_modules!r}")
        if not 32 <= self.block_size <= 4096 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two from 32 to 4096, got {self.block_size}")
        if self.bits == 8 and (self.quant_type != "nf4" or not self.double_quant or self.block_size != 64):
            raise ValueError("quant_type, double_quant and block_size only apply to 4 bits: leave them out")
