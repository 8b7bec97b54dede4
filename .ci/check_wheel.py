"""Run with an installed wheel, outside the checkout: public names import, shipped files are found, a small run works.

The environment holds what the wheel declares and nothing else, so that what only a test's dependency brings is missing
here as it would be for a user.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module, metadata, resources
from pathlib import Path

import lit_lora

TINY = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip


def check_names_and_files(checkout: Path) -> str:
    """Every public name, every configuration and data file."""
    num_names = 0
    for module_name in ("lit_lora", "lit_lora.callbacks"):
        module = import_module(module_name)
        for name in module.__all__:
            getattr(module, name)
            num_names += 1
    shipped = resources.files("lit_lora.configs")
    missing = []
    sources = sorted(p for kind in ("*.yaml", "*.jsonl") for p in (checkout / "configs").rglob(kind))
    for source in sources:
        relative = source.relative_to(checkout / "configs").as_posix()
        if not shipped.joinpath(relative).is_file() or shipped.joinpath(relative).read_bytes() != source.read_bytes():
            missing.append(relative)
    if missing or not sources:
        sys.exit(f"{len(missing)} of {len(sources)} files in configs/ are not in the wheel: {', '.join(missing)}")
    return f"{num_names} public names import, {len(sources)} configuration and data files are there"


def check_runs() -> str:
    """A step of training and a generation, on a folder of plain weights and on one of 4-bit weights."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from lit_lora.__main__ import main
    from lit_lora.base.byte_tokenizer import byte_tokenizer

    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained("plain")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained("plain", quantization_config=quantized).save_pretrained("quantized")
    rows = [json.dumps({"prompt": f"say {number}", "completion": f"it is {number}"}) for number in range(8)]
    Path("data.jsonl").write_text("\n".join(rows))
    os.environ["LIT_LORA_CACHE"] = str(Path("cache").resolve())
    for base in ("plain", "quantized"):
        byte_tokenizer().save_pretrained(base)
        run = Path("runs", base)
        fit = {"model.base": base, "data.train": "data.jsonl", "trainer.max_steps": 3, "trainer.accelerator": "cpu"}
        options = {**fit, "trainer.enable_progress_bar": False, "convergence.min_decrease": -1}
        main(["fit", f"--trainer.default_root_dir={run}", *(f"--{key}={value}" for key, value in options.items())])
        main(["generate", "hi", f"--adapter={run / 'adapter'}", "--max_new_tokens=4"])
    return "fit and generate run on plain and on 4-bit weights"


if __name__ == "__main__":
    checkout = Path(__file__).resolve().parent.parent
    found_in = Path(lit_lora.__file__).resolve()
    if checkout in found_in.parents and "site-packages" not in found_in.parts:
        sys.exit(f"lit_lora came from the checkout ({found_in}), expected the installed wheel")
    unwanted = {"pytest", "peft", "trl"} & {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    if unwanted:
        sys.exit(f"{', '.join(sorted(unwanted))} is installed: expected an environment with the wheel alone")
    print(f"wheel: {check_names_and_files(checkout)}; {check_runs()} ({found_in.parent})")
