"""What was trained is what is run: one way through fit, generate, evaluate, predict, merge, transformers and PEFT."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_lora.base.trained_on import read_record
from lit_lora.data.chats.tokenize import format_prompt
from lit_lora.data.chats.turn_end import TurnEnd
from lit_lora.evaluation.load import load
from lit_lora.language_model.generation import complete
from lit_lora.metrics import TrainingMetrics
from tests.chat_tokenizers import CHATML, KINDS, TOKENS, chat_tokenizer, save_chat_tokenizer
from tests.started_runs import ANSWERS, fit, lit_lora, make_base, questions, validation_loss, write_rows

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

IM_END, EOS = 256 + TOKENS.index("<|im_end|>"), 256


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-lora"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base without a template; its own settings for sampling would spoil greedy answers."""
    folder = tmp_path_factory.mktemp("as_trained")
    make_base(folder / "base")
    GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=9.0, eos_token_id=EOS).save_pretrained(
        folder / "base"
    )
    save_chat_tokenizer(folder / "chatml")
    questions(folder / "questions.jsonl")
    return folder


@pytest.fixture(scope="module")
def chat(place) -> Path:
    """An adapter that knows the answers, trained with ChatML on a base that has no template of its own."""
    data, tokenizer = str(place / "questions.jsonl"), place / "chatml"
    return fit(str(place / "base"), data, place / "chat", max_steps=80, data__tokenizer=tokenizer)


@pytest.fixture(scope="module")
def text(place) -> Path:
    rows = [{"text": f"{prompt} {answer}"} for prompt, answer in ANSWERS.items()]
    data = write_rows(place / "text.jsonl", rows)
    return fit(str(place / "base"), data, place / "text", max_steps=60, model__base=place / "base")


def _generated(capsys: pytest.CaptureFixture[str], *arguments: object, **options: object) -> str:
    capsys.readouterr()
    lit_lora("generate", *arguments, **options)
    return capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object, **options: object) -> str:
    with pytest.raises(SystemExit):
        lit_lora(*arguments, **options)
    return capsys.readouterr().err


# ---------------------------------------------------------------------- the end of an answer


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("prompt", ANSWERS)
def test_generate_stops_where_an_answer_ended_in_training(prompt, stream, chat, capsys):
    assert _generated(capsys, prompt, adapter=chat, stream=stream) == ANSWERS[prompt] + "\n"


@pytest.mark.parametrize("batch_size", [None, 1, 4, 5])
@pytest.mark.parametrize("stride", [1, -1, 3], ids=["in order", "backwards", "mixed"])
def test_answers_of_a_file_are_alike_in_any_order_and_batch_size(batch_size, stride, chat, tmp_path, capsys):
    prompts = [*ANSWERS, *ANSWERS, "say two", "say one"]
    prompts = [prompts[place * stride % len(prompts)] for place in range(len(prompts))]
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    options = {} if batch_size is None else {"batch_size": batch_size}
    lines = _generated(capsys, file, adapter=chat, **options).splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [ANSWERS[prompt] for prompt in prompts]


def test_an_end_that_is_no_special_token_is_not_printed(chat, tmp_path, capsys):
    chat_tokenizer(CHATML, special=False).save_pretrained(tmp_path / "tokenizer")
    assert _generated(capsys, "say one", adapter=chat, tokenizer=tmp_path / "tokenizer") == "yes\n"


def test_evaluate_and_predict_stop_there_too(chat, place, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_lora.data.batches.loaders.PROMPTS_A_BATCH", 3)  # of four
    data = place / "questions.jsonl"
    lit_lora("evaluate", data, chat, output=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["after"] == list(ANSWERS.values())
    assert scores["exact_match"]["after"] == 100
    lit_lora(
        "predict", config=place / "chat" / "config.yaml", ckpt_path="last", trainer__default_root_dir=place / "chat"
    )
    lines = [json.loads(line) for line in (place / "chat" / "predictions.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == list(ANSWERS.values())
    assert not any(line["cut"] for line in lines)


def test_the_merged_model_stops_by_itself_in_plain_transformers(chat, tmp_path):
    lit_lora("merge", chat, tmp_path / "merged", num_samples=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == CHATML
    assert model.generation_config.eos_token_id == [IM_END, EOS]
    assert model.generation_config.repetition_penalty == 9.0  # the base's own settings stay with it
    for prompt, answer in ANSWERS.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False, temperature=1.0, repetition_penalty=1.0, max_new_tokens=40)
        assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]) == f"{answer}<|im_end|>"


def test_the_card_shows_how_to_generate_with_peft(chat, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (chat / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(chat)).replace("Hello", "say three")
    code = code.replace("model.generate(", "output = model.generate(do_sample=False, repetition_penalty=1.0, **")
    code = code.replace("****", "**")
    names: dict[str, Any] = {}
    exec(code, names)
    written = names["output"][0, names["inputs"]["input_ids"].shape[1] :]
    assert names["tokenizer"].decode(written) == "maybe so<|im_end|>"


def test_an_end_in_plain_text_is_a_stop_string(place, tmp_path, capsys):
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer", KINDS["text"].template)
    data = str(place / "questions.jsonl")
    adapter = fit(str(place / "base"), data, tmp_path / "run", max_steps=80, data__tokenizer=tokenizer)
    assert _generated(capsys, "say two", adapter=adapter) == "no way\n"
    lit_lora("evaluate", data, adapter)
    assert "100.0 % after" in capsys.readouterr().out
    lit_lora("merge", adapter, tmp_path / "merged", num_samples=1)
    assert "'###END###'" in capsys.readouterr().out
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [EOS]


class _Counter:
    """A streamer that counts the tokens that it is shown, the prompt's in one piece."""

    num_pieces = 0

    def put(self, ids: Any) -> None:
        self.num_pieces += 1

    def end(self) -> None:
        pass


def test_generating_ends_with_the_token_that_completes_a_stop_string(chat):
    model, tokenizer, _ = load(str(chat))
    prompts = [format_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in ANSWERS]
    end = TurnEnd([], ["ybe", "way"])
    counter = _Counter()
    (alone,) = complete(model, tokenizer, prompts[2:3], end=end, max_new_tokens=40, streamer=counter)
    assert alone == ("ma", False)
    assert counter.num_pieces == 1 + len("maybe")
    together = complete(model, tokenizer, prompts, end=end, max_new_tokens=6)
    assert together[1:3] == [("no ", False), ("ma", False)]
    # A text that only the prompt holds ends nothing.
    (answer,) = complete(model, tokenizer, prompts[:1], end=TurnEnd([IM_END], ["nt\n"]), max_new_tokens=9)
    assert answer == ("yes", False)


def test_cut_answers_are_counted(chat, place, tmp_path, capsys):
    data = place / "questions.jsonl"
    lit_lora("evaluate", data, chat, max_new_tokens=4, output=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["cut"] == {"before": 4, "after": 2}  # "yes" and "ok" and their ends fit
    assert scores["exact_match"]["after"] == 50
    assert "4 before and 2 after of 4 answers were cut at max_new_tokens=4" in capsys.readouterr().out
    lit_lora("generate", "say two", adapter=chat, max_new_tokens=4)
    assert "1 of 1 answers was cut at max_new_tokens=4" in capsys.readouterr().err
    options = {"config": place / "chat" / "config.yaml", "ckpt_path": "last", "model__max_new_tokens": 4}
    lit_lora("predict", **options, trainer__default_root_dir=place / "chat")
    assert "2 of 4 were cut at model.max_new_tokens=4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lit_lora("generate", "say two", adapter=chat, max_new_tokens=0)


# ---------------------------------------------------------------------- the tokenizer


def test_the_adapter_records_what_it_was_trained_with(chat, place):
    record = read_record(chat / "adapter_model.safetensors")
    assert record.quantization == "none"
    assert (record.dtype, record.tokenizer) == ("float32", str(place / "chatml"))
    assert (record.format, record.max_length, record.train_on_prompt) == ("prompt_completion", 1024, False)
    assert (record.turn_end_ids, record.turn_end_strings) == ([IM_END, EOS], [])
    assert AutoTokenizer.from_pretrained(chat).chat_template == CHATML


def _copy(adapter: Path, folder: Path, *, tokenizer: bool) -> Path:
    shutil.copytree(adapter, folder)
    if not tokenizer:
        for path in (*folder.glob("token*"), folder / "chat_template.jinja"):
            path.unlink()
    return folder


@pytest.mark.parametrize("source", ["the folder", "the folder, without its tokenizer", "a checkpoint"])
def test_export_keeps_the_record_and_the_tokenizer(source, chat, tmp_path, capsys):
    adapter: Path = _copy(chat, tmp_path / "copy", tokenizer=source == "the folder")
    if source == "a checkpoint":
        adapter = next((chat.parent / "checkpoints").glob("*.ckpt"))
    lit_lora("export", adapter, tmp_path / "exported")
    weights = "adapter_model.safetensors"
    assert read_record(tmp_path / "exported" / weights) == read_record(chat / weights)
    assert _generated(capsys, "say four", adapter=tmp_path / "exported") == "ok\n"


def test_an_adapter_whose_tokenizer_is_gone_is_refused_by_every_verb_that_needs_it(chat, place, tmp_path, capsys):
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    data = str(place / "questions.jsonl")
    trained = fit(str(place / "base"), data, tmp_path / "run", max_steps=2, data__tokenizer=tokenizer)
    adapter = _copy(trained, tmp_path / "copy", tokenizer=False)
    for arguments in (["generate", "hi", "--adapter", adapter], ["evaluate", data, adapter]):
        lit_lora(*arguments, max_new_tokens=1)  # it is still where the record says
    shutil.rmtree(tokenizer)
    verbs = (
        ["generate", "hi", "--adapter", adapter],
        ["evaluate", data, adapter],
        ["merge", adapter, tmp_path / "merged"],
    )
    for arguments in verbs:
        message = _refused(capsys, *arguments)
        assert f"{place / 'base'}: its chat template is another one" in message
        assert "Give --tokenizer" in message
    lit_lora(*verbs[0], tokenizer=place / "chatml", max_new_tokens=1)  # the same one
    with pytest.warns(UserWarning, match="written without its tokenizer"):
        lit_lora("export", adapter, tmp_path / "exported")


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_a_checkpoint_is_not_run_with_another_tokenizer(verb, chat, place, capsys):
    checkpoint = next((chat.parent / "checkpoints").glob("*.ckpt"))
    options = {
        "model__base": place / "base", "model__lora__r": 16, "data__train": place / "questions.jsonl",
        "data__validation": place / "questions.jsonl", "ckpt_path": checkpoint, "trainer__accelerator": "cpu",
        "trainer__default_root_dir": place / "again", "data__cache_dir": place / "cache",
    }  # fmt: skip
    message = _refused(capsys, verb, **options)
    assert f"data.tokenizer {place / 'base'} is not what the checkpoint was trained with, {place / 'chatml'}" in message
    assert "its chat template is another one" in message
    lit_lora(verb, **options, data__tokenizer=place / "chatml", model__max_new_tokens=1)


OTHERS = {
    "its chat template is another one": lambda: chat_tokenizer(CHATML + " "),
    "it makes other tokens of a text": lambda: _with_another_token(),
}


def _with_another_token() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["brown"])
    return tokenizer


@pytest.mark.parametrize("difference", OTHERS)
def test_another_tokenizer_beside_the_adapter_is_named_and_can_be_forced(difference, chat, tmp_path, capsys):
    adapter = _copy(chat, tmp_path / "copy", tokenizer=True)
    OTHERS[difference]().save_pretrained(adapter)
    message = _refused(capsys, "generate", "say one", adapter=adapter)
    assert f"not what the adapter was trained with: {difference}." in message
    assert f"--tokenizer {adapter}" in message
    with pytest.warns(UserWarning, match=difference):
        assert _generated(capsys, "say one", adapter=adapter, tokenizer=adapter, max_new_tokens=2)


def test_an_adapter_of_another_writer_is_run_with_the_tokenizer_beside_it(chat, place, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    adapter = _copy(chat, tmp_path / "copy", tokenizer=True)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    assert _generated(capsys, "say one", adapter=adapter) == "yes\n"
    adapter = _copy(adapter, tmp_path / "bare", tokenizer=False)
    assert _generated(capsys, "say one", adapter=adapter, max_new_tokens=5) != "yes\n"  # the base's


# ---------------------------------------------------------------------- plain text


def test_an_adapter_of_plain_text_continues_it(text, place, capsys):
    assert _generated(capsys, "say two", adapter=text) == " no way\n"
    assert _generated(capsys, "say two", adapter=text, format="chat", max_new_tokens=8) != " no way\n"
    assert "--format chat has one" in _refused(capsys, "generate", "say two", adapter=text, system="be brief")


def test_messages_that_the_template_refuses_are_an_error_in_one_line(chat, tmp_path, capsys):
    template = "{% if messages[0]['content'] == 'be brief' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer", template + CHATML)
    with pytest.warns(UserWarning, match="its chat template is another one"):
        message = _refused(capsys, "generate", "hi", adapter=chat, tokenizer=tokenizer, system="be brief")
    assert "cannot render these messages (system, user): no system role" in message


def test_an_adapter_of_conversations_can_be_made_to_continue_text(chat, capsys):
    start = "<|im_start|>user\nsay one<|im_end|>\n<|im_start|>assistant\n"
    assert _generated(capsys, start, adapter=chat, format="text", max_new_tokens=3) == "yes\n"


def test_evaluate_measures_the_loss_of_plain_text(text, tmp_path, capsys):
    data = text.parent.parent / "text.jsonl"
    lit_lora("evaluate", data, text, output=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores.keys() == {"mean_loss", "scores"}
    assert scores["scores"].keys() == {"token accuracy", "perplexity"}
    assert scores["mean_loss"]["after"] == pytest.approx(validation_loss(text.parent), rel=1e-5)
    assert "exact match" not in capsys.readouterr().out
    assert "asks for no answers" in _refused(capsys, "evaluate", data, text, min_gain=1)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(text, place, tmp_path, capsys):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["say"])
    tokenizer.save_pretrained(tmp_path / "larger")
    message = "is outside the model's vocabulary of 263: the tokenizer is not the model's"
    for verb in (["generate", "say two", "--adapter", text], ["evaluate", place / "text.jsonl", text]):
        with pytest.warns(UserWarning, match="other tokens of a text"):
            assert message in _refused(capsys, *verb, tokenizer=tmp_path / "larger")


# ---------------------------------------------------------------------- the same loss

LONG = [{"question": f"say {i} " * (i + 1), "reply": f"{i} it is, " * (i + 2)} for i in range(6)]
COLUMNS = {"data__columns": '{"prompt": "question", "completion": "reply"}'}
SETTINGS: dict[str, dict[str, object]] = {
    "as it is": {},
    "truncated": {"data__max_length": 48},
    "prompts too": {"data__train_on_prompt": "true"},
    "padded": {"data__packing": "false"},
    "bfloat16": {"model__dtype": "bfloat16"},
    "float16": {"model__dtype": "float16"},
    "bf16-mixed": {"trainer__precision": "bf16-mixed"},
    "4 bits in bfloat16": {
        "model__quantization__bits": 4,
        "model__quantization__compute_dtype": "bfloat16",
        "model__quantization__skip_modules": '["q_proj", "layers.1.mlp"]',
    },
    "8 bits with dropout": {
        "model__quantization__bits": 8,
        "model__quantization__skip_modules": '["k_proj"]',
        "model__lora__lora_dropout": 0.1,
        "model__lora__target_modules": '["q_proj", "down_proj"]',
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_evaluate_measures_the_loss_that_validation_did(settings, place, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", LONG)
    options = {"data__tokenizer": place / "chatml", "gradient_flow__on_failure": "raise", **COLUMNS, **settings}
    adapter = fit(str(place / "base"), data, tmp_path / "run", max_steps=4, **options)
    lit_lora("evaluate", data, adapter, max_new_tokens=1, output=tmp_path / "scores.json")
    losses = json.loads((tmp_path / "scores.json").read_text())["mean_loss"]
    validation = TrainingMetrics.load(tmp_path / "run" / "metrics.jsonl").validation
    tolerance = 2e-3 if "16" in str(settings) else 1e-5
    assert losses["after"] == pytest.approx(validation[-1]["val_loss"], rel=tolerance)
    assert losses["before"] == pytest.approx(validation[0]["val_loss"], rel=tolerance)
    assert abs(losses["after"] - losses["before"]) > 10 * tolerance


@pytest.mark.parametrize("verb", ["generate", "merge"])
def test_the_dtype_of_training_is_followed_and_can_be_changed(verb, place, tmp_path, capsys):
    data = str(place / "questions.jsonl")
    adapter = fit(str(place / "base"), data, tmp_path / "run", max_steps=2, model__dtype="bfloat16")
    capsys.readouterr()
    for dtype in ("bfloat16", "float32"):
        options = {} if dtype == "bfloat16" else {"dtype": dtype}
        if verb == "generate":
            lit_lora("generate", "hi", adapter=adapter, max_new_tokens=1, **options)
        else:
            lit_lora("merge", adapter, tmp_path / dtype, num_samples=1, **options)
            assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        said = "the base is in bfloat16, as the adapter was trained" in capsys.readouterr().err
        assert said is (dtype == "bfloat16")
