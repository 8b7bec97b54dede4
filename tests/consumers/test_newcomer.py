"""From lines of one's own to a served model by the commands of the tutorial, and llama.cpp answers as was trained.

``promises/test_tutorials.py`` follows the same page up to the exported files wherever the tests run; here the program
that they are for opens the file, through the API that its server has.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.promises.blocks import SMALLER, blocks
from tests.promises.conftest import Stranger, reader, stranger  # noqa: F401
from tests.promises.following import run_block
from tests.promises.test_tutorials import LEARNED, REPEATED

llama_cpp = pytest.importorskip("llama_cpp", reason="make consumers installs it")
pytestmark = [
    pytest.mark.consumers,
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
]

PAGE = "docs/tutorials/your_own_data.md"
F32 = 0
"""ggml's number of float32: keys and values are float16 by default."""


def test_what_the_tutorial_serves_answers_in_llama_cpp_as_generate_does(
    reader: Stranger,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SMALLER, "fit", LEARNED[PAGE])
    ran = []
    for block in blocks(PAGE, "json", "bash"):
        if block.language == "json":
            Path("my.jsonl").write_text(block.text * REPEATED[PAGE])
        else:
            run_block(reader, block)
            ran.append(block.text)
    assert all(f"lit-lora {verb} " in "".join(ran) for verb in ("data", "fit", "evaluate", "generate", "export"))

    served = llama_cpp.Llama("served.gguf", n_ctx=256, verbose=False, type_k=F32, type_v=F32, n_threads=1)
    rows = [json.loads(line) for line in Path("my.jsonl").read_text().splitlines()[:4]]
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        got = served.create_chat_completion(turns, temperature=0.0, repeat_penalty=1.0, max_tokens=80)
        (choice,) = got["choices"]
        said = reader.run("generate", row["prompt"], "--adapter", "runs/mine/adapter", "--max_new_tokens", 80)
        assert said.code == 0, said.text
        assert choice["message"] == {"role": "assistant", "content": said.out.strip()}
        assert choice["finish_reason"] == "stop", "it ends by itself"
        assert said.out.strip() == row["completion"]
    assert len({row["completion"] for row in rows}) == 4
