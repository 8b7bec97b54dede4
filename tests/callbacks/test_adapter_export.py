"""What is exported loads in PEFT and computes the same; a failed write keeps the earlier adapter."""

from __future__ import annotations

import json
import shutil
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from plain_projects import AdapterModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_lora import LoRAConfig
from lit_lora.adapters.inject import inject_lora
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.callbacks import ConvergenceAssertion, HFAdapterExport

# PEFT asks transformers by a name that transformers 5 deprecates, and the Hub for a base that has no id.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(Unable to fetch remote file|Could not find a config file)"),
]

TOKENS = torch.arange(12).reshape(2, 6) + 3


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes))


class Foreign(pl.LightningModule):
    """Someone's own module around a model that has adapters; validation loss falls, then rises."""

    val_losses = (3.0, 1.0, 2.0)

    def __init__(self, model: torch.nn.Module, attribute: str = "model") -> None:
        super().__init__()
        self.save_hyperparameters({"shots": 4})
        self.add_module(attribute, model)
        self.attribute = attribute
        self.num_validations = 0

    def training_step(self, batch, batch_idx):
        return getattr(self, self.attribute)(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.val_losses[self.num_validations], batch_size=2)

    def on_validation_end(self):
        self.num_validations += 1

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self):
        return DataLoader([TOKENS] * 6, batch_size=None)

    val_dataloader = train_dataloader


def with_lit_lora() -> torch.nn.Module:
    model = tiny_llama()
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model


def with_peft() -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), config)


def in_peft(folder: Any) -> torch.nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()


def fit(make_trainer, callback, module, **settings):
    settings = {"max_steps": 6, "limit_val_batches": 1, "val_check_interval": 2, **settings}
    make_trainer(callback, **settings).fit(module)


@pytest.mark.parametrize("make_model", [with_lit_lora, with_peft])
def test_last_and_best_load_in_peft(make_trainer, tmp_path, make_model):
    at_step: dict[int, torch.Tensor] = {}

    class Watched(Foreign):
        def on_validation_start(self):
            at_step[self.global_step] = self.model(TOKENS).logits.detach()

    callback = HFAdapterExport(base_model_name="someone/tiny-llama", data="six batches of counting")
    module = Watched(make_model())
    fit(make_trainer, callback, module)
    assert (callback.best_score, callback.best_step) == (1.0, 4)
    assert callback.verdict.passed
    assert not torch.allclose(at_step[4], at_step[6])
    for folder, step in (("adapter-best", 4), ("adapter", 6)):
        torch.testing.assert_close(in_peft(tmp_path / folder)(TOKENS).logits, at_step[step])
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


class Counting(pl.LightningDataModule):
    """Someone's own datamodule, with a tokenizer and a description of its own."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def train_dataloader(self):
        return DataLoader([TOKENS] * 6, batch_size=None)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), "a name", None], ids=["tokenizer", "name", "none"])
@pytest.mark.parametrize("make_model", [with_lit_lora, with_peft])
def test_the_tokenizer_of_the_datamodule_lies_beside_the_adapter(make_trainer, tmp_path, make_model, tokenizer):
    trainer = make_trainer(HFAdapterExport(monitor=None, base_model_name="someone/tiny"), max_steps=1)
    trainer.fit(Foreign(make_model()), datamodule=Counting(tokenizer))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    saved = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"} | (
        saved if hasattr(tokenizer, "save_pretrained") else set()
    )


@pytest.mark.parametrize("make_model", [with_lit_lora, with_peft])
def test_card_tells_base_data_settings_and_results(make_trainer, tmp_path, make_model):
    callback = HFAdapterExport(base_model_name="someone/tiny-llama", data="six batches of counting")
    fit(make_trainer, callback, Foreign(make_model()))
    card = (tmp_path / "adapter" / "README.md").read_text()
    for text in (
        "someone/tiny-llama",
        "six batches of counting",
        "optimizer | AdamW",
        "learning_rate | 0.01",
        "shots | 4",
        "val_loss | 2",
        "steps | 6",
    ):
        assert text in card, card


def test_saves_every_n_steps(make_trainer, tmp_path):
    seen = []

    class Watched(Foreign):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append((tmp_path / "out" / "adapter_model.safetensors").exists())

    fit(make_trainer, HFAdapterExport(tmp_path / "out", every_n_steps=3, monitor=None), Watched(with_lit_lora()))
    assert seen == [False, False, True, True, True, True]
    assert not (tmp_path / "adapter-best").exists()


def test_failed_write_is_logged_keeps_the_earlier_adapter_and_is_tried_again(make_trainer, tmp_path, caplog):
    folder = tmp_path / "adapter"
    contents = []

    class Blocked(Foreign):
        """A folder lies where the weights' file belongs, as if it could not be replaced, until step 5."""

        def on_train_batch_end(self, outputs, batch, batch_idx):
            config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
            if self.global_step == 2:
                contents.append(config.read_bytes())
                weights.rename(tmp_path / "kept")
                weights.mkdir()
                (weights / "something").touch()
            if self.global_step == 5:
                assert config.read_bytes() == contents[0]
                shutil.rmtree(weights)
                (tmp_path / "kept").rename(weights)

    fit(make_trainer, HFAdapterExport(every_n_steps=2, monitor=None), Blocked(with_lit_lora()))
    assert f"step 4 was not written; the earlier one is kept: {folder}" in caplog.text
    in_peft(folder)
    assert not list(tmp_path.rglob("*.partial"))


def test_leftovers_of_a_killed_process_are_removed_at_the_start(make_trainer, tmp_path):
    folder = tmp_path / "mine"
    left = [folder / ".xyz.partial" / "adapter_model.safetensors", tmp_path / "adapter-best" / ".README.md.x.partial"]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    make_trainer(HFAdapterExport(folder)).fit(Foreign(with_lit_lora()))
    assert not any(path.exists() for path in left)
    assert not list(folder.glob(".*"))


def test_failure_at_the_end_of_fit_raises(make_trainer, tmp_path):
    (tmp_path / "adapter").write_text("a file where the folder belongs")
    callback = HFAdapterExport(monitor=None)
    with pytest.raises(OSError, match="the adapter could not be written"):
        fit(make_trainer, callback, Foreign(with_lit_lora()))
    assert callback.verdict.passed is False


def test_model_under_another_attribute(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no attribute 'model'.*it has: net"):
        fit(make_trainer, HFAdapterExport(), Foreign(with_lit_lora(), "net"))
    fit(make_trainer, HFAdapterExport(model_attr="net"), Foreign(with_lit_lora(), "net"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_model_without_adapters_is_refused_at_the_start(make_trainer):
    trainer = make_trainer(HFAdapterExport(model_attr="layers"))
    with pytest.raises(ValueError, match="holds no adapters"):
        trainer.fit(AdapterModel())
    assert trainer.global_step == 0


def test_monitor_that_is_never_logged_is_reported(make_trainer):
    with pytest.warns(UserWarning, match="val_los was never logged in validation; logged: .*val_loss"):
        fit(make_trainer, HFAdapterExport(monitor="val_los"), Foreign(with_lit_lora()))


def test_best_score_outlives_a_resume(make_trainer, tmp_path):
    callback = HFAdapterExport()
    callback.load_state_dict({"best_score": 0.5, "best_step": 1})
    fit(make_trainer, callback, Foreign(with_lit_lora()))
    assert callback.state_dict() == {"best_score": 0.5, "best_step": 1}
    assert not (tmp_path / "adapter-best").exists()


def test_spoilt_adapter_is_not_exported(make_trainer, tmp_path):
    class Spoilt(Foreign):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad).fill_(torch.nan)

    with pytest.raises(ValueError, match="NaN"):
        fit(make_trainer, HFAdapterExport(monitor=None), Spoilt(with_lit_lora()))
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"mode": "least"}, {"every_n_steps": 0}, {"best_folder": "x", "monitor": None}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        HFAdapterExport(**settings)


def test_trial_run_writes_nothing(make_trainer, tmp_path):
    callback = HFAdapterExport()
    make_trainer(callback, ConvergenceAssertion(), fast_dev_run=True).fit(Foreign(with_lit_lora()))
    assert callback.verdict.passed is None
    assert not list(tmp_path.iterdir())


def test_card_takes_the_datamodules_settings(make_trainer, tmp_path):
    class Counting(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.file, self.max_length, self._cache = "counting.jsonl", 6, "secret"

        def train_dataloader(self):
            return DataLoader([TOKENS] * 6, batch_size=None)

    trainer = make_trainer(HFAdapterExport(monitor=None), max_steps=1)
    trainer.fit(Foreign(with_lit_lora()), datamodule=Counting())
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Counting(file='counting.jsonl', max_length=6)" in card
