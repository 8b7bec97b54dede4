"""A chat template that never ends is stopped and named, wherever it comes in."""

from __future__ import annotations

import gc
import json
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lit_lora.__main__ import main
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.chats import chat_template
from lit_lora.data.chats.chat_template import ChatTemplate
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.files.compute_limit import LimitExceeded, compute_limit
from tests.tiny import config

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(999) %}{{ range(99999) | map('string') | join }}{% endfor %}",
]
GROWING = ["{{ 'a' * 9999999999 }}", "{{ range(99999) | map('string') | join * 99999 }}"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose tokenizer gets its template from a test, and data."""
    gc.collect()  # what runs before have left has no turn within a limit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chat_template, "RENDER_LIMIT_S", 0.2)
    monkeypatch.setattr(chat_template, "RENDER_LIMIT_BYTES", 2**29)
    LlamaForCausalLM(config("Llama", vocab_size=260)).save_pretrained("base")
    Path("my.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")


FIT = ["fit", "--model.base=base", "--data.train=my.jsonl", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]


@pytest.mark.parametrize("command", [FIT, ["generate", "hi", "--base=base"]], ids=["fit", "generate"])
@pytest.mark.parametrize("template", [*ENDLESS, *GROWING])
def test_a_chat_template_without_end_is_stopped_and_its_tokenizer_named(folder, capsys, command, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained("base")
    with pytest.raises(SystemExit) as caught:
        main([*command])
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert "the chat template of base does not come to an end on 1 conversation" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("template", [*ENDLESS, *GROWING])
def test_it_is_stopped_where_only_the_end_of_an_answer_is_looked_for(folder, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LimitExceeded, match="does not come to an end"):
        turn_end(tokenizer)


@pytest.mark.parametrize(
    "template", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}", "{{ none + 1 }}", "{% if %}"]
)
@pytest.mark.parametrize("command", [FIT, ["generate", "hi", "--base=base"]], ids=["fit", "generate"])
def test_a_chat_template_that_fails_is_told(folder, capsys, command, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained("base")
    with pytest.raises(SystemExit):
        main([*command])
    error = capsys.readouterr().err
    assert "the chat template of base cannot render" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [FIT, ["generate", "hi", "--base=base"]], ids=["fit", "generate"])
def test_a_chat_template_with_a_power_that_nothing_could_interrupt_is_refused(folder, capsys, command):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 9 ** (9 ** 9) }}"
    tokenizer.save_pretrained("base")
    with pytest.raises(SystemExit):
        main([*command])
    assert "the chat template of base raises to a power (**)" in capsys.readouterr().err


def test_stars_that_spread_arguments_are_no_power():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ dict(messages[0], ** {'a': '**'})['content'] }}"
    with ChatTemplate(tokenizer).limit([]):
        pass


def test_a_limit_leaves_the_timer_and_handler_of_others_as_they_were():
    def others(signum, frame):
        raise AssertionError("not yet")

    before = signal.signal(signal.SIGVTALRM, others)
    signal.setitimer(signal.ITIMER_VIRTUAL, 100.0)
    try:
        with pytest.raises(LimitExceeded, match="too long"), compute_limit(0.05, "too long"):
            re.match(r"(a+)+b", "a" * 60)
        assert signal.getsignal(signal.SIGVTALRM) is others
        assert 90 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] < 101
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_elsewhere_than_in_the_main_thread_there_is_no_limit():
    done = []

    def work():
        with compute_limit(1e-6, "too long", memory_bytes=1):
            done.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [sum(range(10**6))]


def _go_on_after_an_error():
    """As the interpreter does with one in a callback of its garbage collector."""
    try:
        while True:
            pass
    except LimitExceeded:
        while True:
            pass


def test_the_limit_holds_though_the_first_error_was_swallowed():
    with pytest.raises(LimitExceeded, match="too long"), compute_limit(0.05, "too long"):
        _go_on_after_an_error()


@pytest.mark.parametrize("memory", [2**40, None])
def test_memory_that_runs_out_is_the_fault_of_what_has_a_limit_of_it(memory):
    with pytest.raises(LimitExceeded if memory else MemoryError), compute_limit(5, "too much", memory_bytes=memory):
        raise MemoryError
