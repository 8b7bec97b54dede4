"""lm-evaluation-harness on a base and its adapter: what it measures is what transformers says of the same texts.

``make consumers`` installs it and runs these. The task is one of a folder, with a local file: nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_lora.__main__ import main
from lit_lora.adapters.merge import disable_lora
from lit_lora.evaluation.load import load
from tests.small_adapters import small_adapter

pytest.importorskip("lm_eval", reason="make consumers installs it")
pytestmark = [pytest.mark.consumers, pytest.mark.filterwarnings("ignore")]

QUESTIONS = [
    {
        "question": f"Water there falls {n} times:",
        "choices": [f"{n * k % 89:02d}x" for k in (3, 7, 31)],
        "answer": n % 3,
    }
    for n in range(1, 41)
]
"""Choices of one length, of which a model with random weights takes any."""
TASK = {
    "task": "falling_water", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "falling_water.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracy(model, tokenizer) -> float:
    """Share of the questions whose right choice is the most likely one, by transformers."""
    hits = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[n - 1, ids[n]].item() for n in range(len(start), len(ids))))
        hits += max(range(3), key=scores.__getitem__) == row["answer"]
    return hits / len(QUESTIONS)


def test_accuracy_of_a_task_is_that_of_transformers_with_the_adapter_and_without(folder, tmp_path, capsys):
    adapter = small_adapter(tmp_path)
    output = tmp_path / "found" / "harness.json"
    main(["harness", "falling_water", "--adapter", adapter, "--folder", str(folder), "--output", str(output),
          "--batch_size", "5"])  # fmt: skip
    found = json.loads(output.read_text())
    loaded = load(adapter)
    with disable_lora(loaded.model):
        before = accuracy(loaded.model, loaded.tokenizer)
    after = accuracy(loaded.model, loaded.tokenizer)
    assert before != after, "they would be told apart"
    assert found["base"]["falling_water"]["acc,none"] == pytest.approx(before)
    assert found["adapter"]["falling_water"]["acc,none"] == pytest.approx(after)
    shown = capsys.readouterr().out
    assert "falling_water  acc" in shown
    assert f"{before:.4f} ± " in shown
    assert f"{after:.4f} ± " in shown

    main(["harness", "falling_water", "--base", str(tmp_path / "base"), "--folder", str(folder), "--chat"])
    assert "adapter" not in capsys.readouterr().out


def test_a_task_that_is_not_there_is_named_before_anything_is_loaded(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["harness", "faling_water", "--base", "nowhere", "--folder", str(folder)])
    assert "faling_water: did you mean 'falling_water'" in capsys.readouterr().err
