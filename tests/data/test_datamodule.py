"""SFTDataModule: what it says, what it refuses, what it hands out."""

from __future__ import annotations

import json
import logging
import os
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import LlamaConfig, LlamaForCausalLM

from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.batches.sampler import split_indices
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.prepared import encoding

ROWS = [{"prompt": f"question {i}", "completion": "answer " * (1 + i % 4) + str(i)} for i in range(20)]


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "train.jsonl", ROWS)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(file: Path, **options) -> SFTDataModule:
    return SFTDataModule(str(file), **{"tokenizer": "bytes", "cache_dir": file.parent / "cache", **options})


def ready(file: Path, stage: str = "fit", **options) -> SFTDataModule:
    data = make(file, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def test_an_epoch_holds_every_example_once(file) -> None:
    data = ready(file, batch_size=3)
    batches = list(data.train_dataloader())
    assert sorted(index for batch in batches for index in batch["example_ids"].tolist()) == list(range(20))
    assert [len(batch["example_ids"]) for batch in batches] == [3] * 6 + [2]
    tokenizer = byte_tokenizer()
    for batch in batches:
        ends = [index for index, token in enumerate(batch["target_ids"].tolist()) if token == tokenizer.eos_token_id]
        assert len(ends) == len(batch["example_ids"]), "every answer ends with a supervised end token"


def test_summary_says_what_was_done(file, caplog, request) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(caplog.handler)
    request.addfinalizer(lambda: log.removeHandler(caplog.handler))
    rows = [
        *ROWS,
        ROWS[0],
        {"prompt": "x" * 300, "completion": "y"},
        {"prompt": "only"},
        {"prompt": "z" * 60, "completion": "w" * 80},
    ]
    data = ready(write(file, rows), max_length=120, on_bad_rows="drop")
    text = str(data.summary)
    assert text in caplog.messages
    supervised = (
        sum(len(row["completion"]) + 1 for row in [*ROWS, ROWS[0]]) + 120 - len(f"<user:\n{'z' * 60}>\nassistant:\n")
    )
    share = supervised / data.summary.num_tokens
    assert data.summary.num_supervised == supervised
    for line in (
        f"train.jsonl (prompt_completion): 22 examples, {data.summary.num_tokens:,} tokens, {share:.0%} supervised; "
        "6 micro-batches an epoch, packed, no padding",
        "  2 truncated at max_length",
        "  1 dropped: no supervised token left after truncation",
        "  1 dropped: bad rows",
        "train.jsonl:23: no field 'completion', got ['prompt']",
        "  1 exact duplicates (kept)",
        "  | 〔<bos>user:",
        "  | 〕answer 0<eos>",
    ):
        assert line in text
    assert "padding" in str(ready(file, packing=False, on_bad_rows="drop").summary)


def test_nothing_supervised_is_an_error(file) -> None:
    with pytest.raises(ValueError, match=r"none of the 20 examples has a supervised token within max_length=12"):
        ready(file, max_length=12)


def test_tokenizing_happens_once(file, monkeypatch) -> None:
    first = ready(file)
    monkeypatch.setattr(encoding, "encode_examples", None)
    again = ready(file)
    assert again.train_data.ids.tolist() == first.train_data.ids.tolist()
    assert again.train_data.statistics == first.train_data.statistics


@pytest.mark.parametrize(
    "change", [{"max_length": 99}, {"train_on_prompt": True}, {"limit": 5}, {"tokenizer": "other template"}]
)
def test_another_setting_or_tokenizer_tokenizes_again(file, change) -> None:
    ready(file)
    if "tokenizer" in change:
        change = {"tokenizer": byte_tokenizer()}
        change["tokenizer"].chat_template += " "
    ready(file, **change)
    assert len(list((file.parent / "cache").glob("*.safetensors"))) == 2


def test_changed_data_is_tokenized_again(file) -> None:
    before = len(ready(file).train_data)
    write(file, ROWS[1:])
    assert len(ready(file).train_data) == before - 1


def test_a_damaged_cache_is_built_again(file) -> None:
    first = ready(file).train_data
    ids = first.ids.tolist()
    (cached,) = (file.parent / "cache").glob("*.safetensors")
    cached.write_bytes(cached.read_bytes()[:300])
    with pytest.raises(OSError, match="has become shorter since it was opened"):
        first[3]
    with pytest.warns(UserWarning, match="tokenizing again"):
        again = ready(file).train_data
    assert again.ids.tolist() == ids
    assert ready(file).train_data.ids.tolist() == ids, "without a warning"


def test_what_killed_runs_left_in_the_cache_is_removed_but_not_what_another_run_writes(file) -> None:
    cache = file.parent / "cache"
    cache.mkdir()
    old, new = cache / ".a.safetensors.x.partial", cache / ".a.safetensors.y.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    ready(file)
    assert list(cache.glob(".*")) == [new]


def test_source_lines_of_a_split(file) -> None:
    data = ready(file, validation_fraction=0.25)
    lines = data.source_lines([*range(len(data.train_data)), -1])
    assert lines == [*data.train_data.lines.tolist(), -1]
    assert lines[:-1] != list(range(1, 16))


def test_a_cache_that_cannot_be_written_is_no_obstacle(file) -> None:
    blocked = file.parent / "cache"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the tokenized data is not cached"):
        assert len(ready(file).train_data) == 20


def test_validation_split_is_a_fixed_partition(file) -> None:
    first, again = ready(file, validation_fraction=0.25), ready(file, validation_fraction=0.25)
    other = ready(file, validation_fraction=0.25, seed=1)
    lines = [data.validation_data.lines.tolist() for data in (first, again, other)]
    assert len(lines[0]) == 5
    assert lines[0] == lines[1] != lines[2]
    assert sorted([*lines[0], *first.train_data.lines.tolist()]) == list(range(1, 21))
    ids = [index for batch in first.val_dataloader() for index in batch["example_ids"].tolist()]
    assert ids == list(range(5)), "in order, each once"


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.1), (1, 0.5), (3, 0.99)])
def test_a_split_without_room_is_refused(count, fraction) -> None:
    with pytest.raises(ValueError, match="both parts need at least one"):
        split_indices(count, fraction, 0)


def test_test_data_and_its_fallback(file, tmp_path) -> None:
    other = write(tmp_path / "test.jsonl", ROWS[:3])
    data = ready(file, "test", validation_fraction=0.25, test=str(other))
    assert sum(len(batch["example_ids"]) for batch in data.test_dataloader()) == 3
    data = ready(file, "test", validation=str(other))
    assert sum(len(batch["example_ids"]) for batch in data.test_dataloader()) == 3
    data = ready(file, "validate")
    with pytest.raises(ValueError, match=r"there is no validation data: set validation or validation_fraction"):
        data.val_dataloader()
    with pytest.raises(ValueError, match="there is no test data"):
        data.test_dataloader()


def test_prompts_for_prediction(file) -> None:
    data = ready(file, "predict", validation_fraction=0.25)
    (prompts,) = data.predict_dataloader()
    tokenizer = byte_tokenizer()
    for index, prompt in enumerate(prompts):
        row = ROWS[data.validation_data.lines[index] - 1]
        assert tokenizer.decode(prompt["prompt_ids"][0]) == f"<bos>user:\n{row['prompt']}<eos>\nassistant:\n"
        assert prompt["reference"] == row["completion"]
        assert prompt["example_ids"].tolist() == [index]
    assert len(prompts) == 5


def test_prompts_of_a_conversation_ask_for_the_last_answer(tmp_path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    data = ready(write(tmp_path / "a.jsonl", [{"messages": turns}]), "predict")
    ((prompt,),) = data.predict_dataloader()
    assert prompt["reference"] == "assistant 1"
    assert "assistant 0" in byte_tokenizer().decode(prompt["prompt_ids"][0])
    data = ready(write(tmp_path / "b.jsonl", [{"text": "plain"}]), "predict")
    with pytest.raises(ValueError, match="plain text, which has no prompts"):
        data.predict_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"validation_fraction": 0.5, "validation": "b.jsonl"}, "no effect beside a validation file"),
        ({"max_length": 1}, "max_length must be at least 2 tokens"),
        ({"limit": 0}, "limit must be at least 1 row"),
        ({"on_bad_rows": "skip"}, "on_bad_rows must be 'error' or 'drop'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SFTDataModule("a.jsonl", **options)


def test_an_example_beyond_the_token_budget_is_refused_at_setup(file) -> None:
    with pytest.raises(ValueError, match=r"exceeds max_tokens_per_batch=50: raise it, or set max_length=50"):
        ready(file, max_tokens_per_batch=50)


def test_missing_file(file) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean .*train\.jsonl"):
        ready(file.with_name("trian.jsonl"))


def test_no_tokenizer_is_said_clearly(file) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.*set tokenizer"):
        ready(file, tokenizer=None)


class Module(BoringModel):
    """Names its base model, and builds it where Lightning wants it built."""

    def __init__(self, base: str = "bytes", vocab_size: int = 259) -> None:
        super().__init__()
        self.base = base
        self.vocab_size = vocab_size
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
            self.model = LlamaForCausalLM(LlamaConfig(vocab_size=self.vocab_size, **shape))

    def training_step(self, batch, batch_idx):
        assert batch["input_ids"].max() < self.vocab_size
        return self.layer(torch.randn(2, 32)).sum()

    def predict_step(self, batch, batch_idx):
        return [prompt["reference"] for prompt in batch]


def trainer(**options) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)


FEW_WORKERS = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
LIGHTNING_PYTREE = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
EVAL_MODE = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")


@FEW_WORKERS
@LIGHTNING_PYTREE
@EVAL_MODE
def test_with_a_trainer_the_tokenizer_is_the_modules(file) -> None:
    data = make(file, tokenizer=None)
    fitted = trainer()
    fitted.fit(Module(), datamodule=data)
    assert len(data.tokenizer) == 259
    assert fitted.limit_val_batches == 1.0, "given back after training without validation data"
    answers = trainer().predict(Module(), datamodule=make(file, tokenizer=None, limit=4))
    assert answers == [[row["completion"] for row in ROWS[:4]]]


@FEW_WORKERS
@LIGHTNING_PYTREE
@EVAL_MODE
def test_a_model_without_an_embedding_for_every_token_is_refused(file) -> None:
    with pytest.raises(ValueError, match=r"token id 258 .* is outside the model's vocabulary of 258"):
        trainer().fit(Module(vocab_size=258), datamodule=make(file))


def test_lightnings_own_sampler_is_refused(file) -> None:
    data = make(file)
    connector = types.SimpleNamespace(use_distributed_sampler=True)
    data.trainer = types.SimpleNamespace(world_size=2, global_rank=0, _accelerator_connector=connector)
    with pytest.raises(ValueError, match="set use_distributed_sampler=False for the Trainer"):
        data.setup("fit")


def test_loaders_leave_the_global_random_state_alone(file) -> None:
    data = ready(file, validation_fraction=0.25)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_token_of_a_longer_file_is_handed_out_once_within_the_limit(tmp_path, requests) -> None:
    data = SFTDataModule(
        str(requests), tokenizer="bytes", cache_dir=tmp_path, limit=300, max_tokens_per_batch=4096, max_length=2048
    )
    data.setup("fit")
    assert len(data.train_data) == 300
    batches = list(data.train_dataloader())
    assert sum(batch["num_tokens"] for batch in batches) == len(data.train_data.ids)
    assert max(batch["num_tokens"] for batch in batches) <= 4096
    assert '"day":"wednesday"}' in str(data.summary)
