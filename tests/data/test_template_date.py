"""A chat template that writes today's date writes the same one for all of a run, on whatever day it goes on."""

from __future__ import annotations

import datetime as real
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_lora.__main__ import main
from lit_lora.data.chats.chat_template import ChatTemplate
from lit_lora.data.chats.tokenize import format_prompt
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files.checkpoint import read_checkpoint
from tests.chat_tokenizers import CHATML, VOCAB_SIZE, chat_tokenizer
from tests.tiny import config

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

DATED = "Today: {{ strftime_now('%Y-%m-%d') }}\n" + CHATML
TURNS = [{"role": "user", "content": "u"}]


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    date = SimpleNamespace(today=lambda: real.date.fromisoformat(day))
    monkeypatch.setattr("lit_lora.data.run_date.datetime", SimpleNamespace(date=date))


@pytest.mark.parametrize("day", ["2026-11-05", "2024-02-29"])
@pytest.mark.parametrize(
    "format", ["%Y-%m-%d", "%d %b %Y", "%A, %B %d", "%-d.%-m.%y", "%e %F %D %T %R", "100 %% %H:%M %p %j", "plain"]
)
def test_it_is_written_as_the_clock_would(format, day) -> None:
    template = ChatTemplate(chat_tokenizer("{{ strftime_now('" + format + "') }}|" + CHATML), day)
    assert template.render(TURNS).split("|<|im")[0] == real.datetime.fromisoformat(day).strftime(format)


@pytest.mark.parametrize(
    ("template", "beginning"),
    [
        (DATED, "Today: 2026-11-05\n<|im_start|>"),
        ("\n  " + DATED, "\n  Today: 2026-11-05\n<|im_start|>"),
        ("  {%- if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}\n" + CHATML, "05<|im_start|>"),
    ],
)
def test_the_rest_of_the_template_is_as_it_was(template, beginning) -> None:
    written = ChatTemplate(chat_tokenizer(template), "2026-11-05").render(TURNS)
    assert written.startswith(beginning)
    today = real.date.today().isoformat()  # against transformers' own clock, whatever day it is
    tokenizer = chat_tokenizer(template)
    assert ChatTemplate(tokenizer, today).render(TURNS) == ChatTemplate(tokenizer).render(TURNS)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config("Llama", vocab_size=VOCAB_SIZE).to_json_file("tiny.json")
    chat_tokenizer(DATED).save_pretrained("tokenizer")
    rows = [{"prompt": f"say {i}", "completion": "it is " + "x" * i} for i in range(8)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ARGUMENTS = [
    "--model.base", "random:tiny.json", "--data.train", "my.jsonl", "--data.tokenizer", "tokenizer",
    "--data.cache_dir", "cache", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run",
    "--convergence.min_decrease", "-9",
]  # fmt: skip


def test_a_run_that_goes_on_another_day_sees_the_same_tokens(folder, monkeypatch, capsys, caplog) -> None:
    on("2026-11-05", monkeypatch)
    main(["fit", *ARGUMENTS, "--trainer.max_steps", "1"])
    assert "8 times: the chat template writes the date: it is 2026-11-05 for all of a run" in caplog.text
    caplog.clear()
    shutil.rmtree("cache")
    on("2026-11-06", monkeypatch)
    main(["fit", *ARGUMENTS, "--trainer.max_steps", "2", "--ckpt_path", "last"])
    checkpoints = sorted(Path("run").glob("checkpoints/*.ckpt"))
    found = {read_checkpoint(path)["global_step"]: path for path in checkpoints}
    fingerprint = read_checkpoint(found[2])["SFTDataModule"]["fingerprint"]
    assert fingerprint["source"]["template_date"] == "2026-11-05"
    assert "Today: 2026-11-05" in caplog.text
    with pytest.raises(SystemExit):
        main(
            ["fit", *ARGUMENTS, "--trainer.max_steps", "3", "--ckpt_path", "last", "--data.template_date", "2026-11-06"]
        )
    assert "data.template_date was '2026-11-05' and is '2026-11-06'" in capsys.readouterr().err


def test_prompts_have_the_date_of_the_run(folder, monkeypatch) -> None:
    on("2026-11-05", monkeypatch)
    tokenizer = chat_tokenizer(DATED)
    data = SFTDataModule("my.jsonl", tokenizer=tokenizer, cache_dir="cache")
    data.setup("predict")
    batch, *_ = next(iter(data.predict_dataloader()))
    assert batch["prompt_ids"][0].tolist() == format_prompt(
        tokenizer, [{"role": "user", "content": "say 0"}], date="2026-11-05"
    )
    assert "Today: 2026-11-05" in tokenizer.decode(data.train_data[0].ids)


def test_a_template_without_one_is_told_none(folder, monkeypatch) -> None:
    on("2026-11-05", monkeypatch)
    data = SFTDataModule("my.jsonl", tokenizer=chat_tokenizer(CHATML), cache_dir="cache")
    data.setup("fit")
    assert data.source_settings.template_date is None


@pytest.mark.parametrize("day", ["2026-13-01", "5 Nov 2026", "20261105", ""])
def test_what_is_no_day_is_refused(day) -> None:
    with pytest.raises(ValueError, match="template_date must be a day as YYYY-MM-DD"):
        SFTDataModule("my.jsonl", template_date=day)
