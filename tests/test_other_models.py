"""The classes of ``docs/other_models.md``, as they stand there: each learns, and PEFT reads what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import StackDataset

import lit_lora
from lit_lora import LoRAConfig, OptimizationConfig
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from tests.promises.blocks import blocks
from tests.tiny import config

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]

NUM_ROWS, LENGTH = 48, 9


def documented() -> dict[str, Any]:
    given: dict[str, Any] = {}
    for block in blocks("docs/other_models.md", "python"):
        exec(compile(block.code, f"{block.page}:{block.line}", "exec"), given)
    return given


def tokens() -> Tensor:
    return torch.randint(5, 60, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def texts() -> dict[str, Tensor]:
    ids, labels = tokens(), torch.arange(NUM_ROWS) % 3
    ids[:, 2] = labels + 100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tagged() -> dict[str, Tensor]:
    ids = tokens()
    labels = ids % 3
    labels[:, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def translated() -> dict[str, Tensor]:
    rows = texts()
    labels = rows["labels"][:, None].repeat(1, 5) + 20
    labels[::2, -1] = -100
    return {**rows, "labels": labels}


def images() -> dict[str, Tensor]:
    labels = torch.arange(NUM_ROWS) % 3
    noise = torch.randn(NUM_ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise + labels[:, None, None, None], "labels": labels}


def pairs() -> dict[str, Tensor]:
    asked = tokens()
    found, mask = asked.clone(), torch.ones_like(asked)
    found[:, ::2] += 60
    mask[::2, -1] = 0
    return {"query_ids": asked, "query_mask": torch.ones_like(asked), "answer_ids": found, "answer_mask": mask}


IMAGE = {"image_size": 8, "patch_size": 4}
T5 = {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2, "decoder_start_token_id": 0, "tie_word_embeddings": False}
CASES: dict[str, tuple[str, dict[str, Any], Any, str | None, set[str]]] = {
    "Classifier": ("BertModel", {}, texts, "SEQ_CLS", {"classifier"}),
    "Tagger": ("BertModel", {}, tagged, "TOKEN_CLS", {"classifier"}),
    "Translator": ("T5ForConditionalGeneration", T5, translated, "SEQ_2_SEQ_LM", set()),
    "ImageClassifier": ("ViTModel", IMAGE, images, None, {"classifier"}),
    "Embedder": ("BertModel", {}, pairs, None, set()),
}
"""Class of the page -> the base that lies in a folder, its sizes, rows, PEFT's name for the task, and heads."""


def stored_base(folder: Path, kind: str, sizes: dict[str, Any]) -> str:
    torch.manual_seed(0)
    made = getattr(transformers, kind)(config(kind.partition("For")[0].removesuffix("Model"), **sizes))
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return str(folder)


def computed(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        if "query_ids" in rows:
            return model.eval()(rows["query_ids"], rows["query_mask"]).last_hidden_state
        return model.eval()(**rows).logits


def test_every_class_of_the_page_has_a_row() -> None:
    given = documented()
    kinds = {name for name, kind in given.items() if isinstance(kind, type) and kind.__module__ == "builtins"}
    assert kinds == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_it_learns_is_read_by_peft_and_comes_back_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    base_kind, sizes, make_rows, task, heads = CASES[name]
    base, rows, kind = stored_base(tmp_path / "base", base_kind, sizes), make_rows(), documented()[name]
    lora = LoRAConfig(r=8, exclude_modules=["pooler.dense"] if name == "Embedder" else None)
    module = kind(base, lora=lora, optimization=OptimizationConfig(learning_rate=2e-2))
    examples: StackDataset[Any] = StackDataset(**rows)
    data = LightningDataModule.from_datasets(examples, examples, batch_size=12)
    outcome = lit_lora.fit(
        module, data, tmp_path / "run", quiet=True, report=False, accelerator="cpu", max_steps=48, max_epochs=-1,
        callbacks=[ConvergenceAssertion(0.3, 8), TrainingCheckpoint(every_n_steps=48)],
    )  # fmt: skip
    assert outcome is not None
    assert outcome.result == "proved", outcome
    assert module.training_metrics.validation[-1]["val_loss"] < 0.7 * module.training_metrics.validation[0]["val_loss"]

    written = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert written["task_type"] == task
    assert set(written["modules_to_save"] or ()) == heads
    torch.manual_seed(99)  # another head to begin with
    by_peft = peft.PeftModel.from_pretrained(kind(base).load_base(), str(tmp_path / "run/adapter"))
    expected = computed(module.model, rows)
    torch.testing.assert_close(computed(by_peft.base_model.model, rows), expected, atol=1e-4, rtol=1e-4)
    again = kind.load_from_checkpoint(tmp_path / "run/checkpoints/step=00000048.ckpt")
    torch.testing.assert_close(computed(again.model, rows), expected, atol=1e-4, rtol=1e-4)
