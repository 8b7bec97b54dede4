"""``lit-lora merge``: an adapter folded into its base, as a folder that plain transformers loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.evaluation.drift import Drift


def merge(
    adapter: str,
    output: str,
    base: str | None = None,
    revision: str | None = None,
    into: Literal["auto", "base", "dequantized", "4bit"] = "auto",
    quantization: QuantizationConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    sample: str | None = None,
    num_samples: int = 16,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Drift]:
    """Merge an adapter into its base, and measure what that changes.

    Args:
        adapter: folder in PEFT's format.
        output: folder to make: model, the tokenizer and chat template of the training, and what ends an answer.
        base: base model, as in --model.base; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        into: "base" merges into the weights as they were before quantization; "dequantized" into those that a
            quantized base computes with; "auto" measures both on the sample and takes the one that is nearer to the
            model as trained; "4bit" quantizes the dequantized result again, which loses precision.
        quantization: how the base was quantized in training; by default as the adapter says, or its run's config.yaml.
        dtype: dtype of the merged weights; by default that of the base in training. auto is bfloat16 on CUDA and
            float32 on a CPU.
        tokenizer: name or folder of another tokenizer than the adapter's.
        sample: file of texts to measure the drift on, in any format that training reads; by default one that ships.
        num_samples: how many of its texts.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.

    Returns:
        The drift of the merged model's logits, by what it is compared with.
    """
    from lit_lora.evaluation import merge as merging
    from lit_lora.runs.said import readable

    with readable():
        merged = merging.merge(
            adapter,
            output,
            base=base,
            revision=revision,
            into=into,
            quantization=quantization,
            dtype=dtype,
            tokenizer=tokenizer,
            sample=sample,
            num_samples=num_samples,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    if merged.stop_strings:
        print(
            f"an answer ends with the text {' or '.join(map(repr, merged.stop_strings))}, for which there is no token: "
            "give it as a stop string to whatever serves the merged model"
        )
    print(f"merged model in {merged.folder}")
    for line in merged.said():
        print(line)
    return merged.drifts
