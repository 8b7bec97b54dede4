"""The two files of an adapter, written whole or not at all, and read back before they replace anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_lora.adapters.module_names import some
from lit_lora.files.atomic import FileToWrite, atomic_write_all
from lit_lora.interchange.adapter_state import same_tensor
from lit_lora.interchange.checksum import serialize
from lit_lora.interchange.peft_config import from_peft_config
from lit_lora.interchange.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    content: dict[str, Any],
    metadata: Mapping[str, str],
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an adapter.

    Args:
        folder: to make; other files in it are left alone.
        tensors: by their names in the file.
        content: of ``adapter_config.json``.
        metadata: what the header of the weights says beside the checksum.
        more: further files, which are there before the adapter is.

    Returns:
        The folder.

    Raises:
        OSError: if the folder cannot be written to. An earlier adapter in it is then as it was.
    """
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    data = serialize(plain, from_peft_config(content), metadata)

    def check_weights(path: Path) -> None:
        written = read_tensors(path)
        differing = [n for n in plain.keys() | written.keys() if not same_tensor(plain.get(n), written.get(n))]
        if differing:
            raise ValueError(f"{path} does not hold what was written: {some(sorted(differing))} differ")

    files = []
    for name, file_content in (more or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.append(FileToWrite(folder / name, lambda f, content=file_content: f.write(content)))  # type: ignore[misc]
    folder.mkdir(parents=True, exist_ok=True)
    files.append(FileToWrite(folder / WEIGHTS_NAME, lambda f: f.write(data), check_weights))
    files.append(FileToWrite(folder / CONFIG_NAME, lambda f: f.write(text.encode())))
    atomic_write_all(files)
    return folder
