"""Load a transformers model whole or not at all.

transformers fills what a checkpoint does not have with random numbers, drops what it has too much, and only logs that.
A fine-tuning run on such a base is a run on nonsense, so here it is an error; so is an index that points out of its
folder, and whatever else a damaged folder makes the library stumble over. An adapter beside the weights, which the
library would load along where PEFT is installed, is one too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import find_adapter_config_file

from lit_lora.base.whose_error import is_panic
from lit_lora.wording import setting

T = TypeVar("T")
INDEX = "model.safetensors.index.json"


def load_whole(location: str, options: dict[str, Any]) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``, strict.

    Args:
        location: folder or Hub id.
        options: keyword arguments.

    Raises:
        ValueError: naming the tensors that are missing, left over or misshapen, or what else is wrong.
    """
    _check_index(Path(location))
    check_no_adapter(location, options.get("revision"))
    loaded: Any = readable(
        location, lambda: AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **options)
    )
    model, report = loaded
    problems = [
        f"{what} {', '.join(sorted(map(str, names))[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (
            ("missing", report["missing_keys"]),
            ("left over", report["unexpected_keys"]),
            ("misshapen", report["mismatched_keys"]),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {location} are not those of its config.json: {'; '.join(problems)}. "
            "Check that both are of one model and that every shard is there"
        )
    return model


def check_no_adapter(location: str, revision: str | None = None) -> None:
    """With PEFT installed, transformers puts an adapter that it finds beside a model on it, without a word.

    Args:
        location: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: if there is one, saying what to do.
    """
    if find_adapter_config_file(location, revision=revision) is None:
        return
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        raise ValueError(f"{location} holds an adapter and no model: give the adapter's base as the base")
    raise ValueError(
        f"{location} holds an adapter beside the model (adapter_config.json), and transformers would load both. To "
        "train on the model alone, move adapter_config.json and adapter_model.safetensors to another folder (for a "
        "model of the Hub, download it without them); to train on both, `lit-lora merge` the adapter into the model"
    )


def readable(location: str, load: Callable[[], T]) -> T:
    """``load()``, with whatever it stumbles over told in one line that names ``location``.

    Raises:
        ValueError: for damaged or contradictory files.
    """
    try:
        return load()
    except (OSError, ImportError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a broken file reaches us as any of a dozen types
        reason = f"{(str(error).strip().splitlines() or [''])[0]:.500}"
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            reason = f"it comes with code of its own, which runs only with {setting('model.trust_remote_code', True)}"
        if reason.startswith("Unrecognized configuration class"):  # and a list of some hundred that are recognized
            raise ValueError(
                f"{location} is no causal language model that transformers knows: for a model of another kind override "
                "load_base and compute_loss of LoRALightningModule"
            ) from error
        raise ValueError(f"cannot load {location}: {type(error).__name__}: {reason}") from error


def _check_index(folder: Path) -> None:
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: expected JSON with a weight_map ({error})") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} points to {name!r}: expected names of *.safetensors files in its own folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is not there: fetch the whole model")
