"""``lit-lora chat``: turns over a pipe and on a terminal, commands, and what is kept of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lit_lora
from lit_lora.evaluation.chat import Chat
from lit_lora.tools import chat as verb
from tests.started_runs import fit, make_base, questions

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows by heart that "say one" is answered with "yes"."""
    folder = tmp_path_factory.mktemp("chat")
    return fit(make_base(folder / "base"), questions(folder / "rows.jsonl"), folder / "run", max_steps=100)


@pytest.fixture
def said(adapter: Path, said: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    """Over a pipe: lines in, (answers, notes) out."""

    def chatted(*lines: str, **options: object) -> tuple[str, str]:
        given = {"adapter": adapter, "max_new_tokens": 12, **options}
        return said("chat", stdin="".join(line + "\n" for line in lines), **given)

    return chatted


@pytest.mark.parametrize("stream", ["true", "false"])
def test_each_line_of_a_pipe_is_a_turn(stream, said) -> None:
    out, err = said("say one", "", "/new", "say four", stream=stream)
    assert out == "yes\nok\n"
    assert verb.PROMPT not in out
    assert "nothing has been said" in err


def test_an_answer_goes_on_from_all_that_was_said(adapter: Path) -> None:
    loaded = lit_lora.load(str(adapter))
    chat = Chat(loaded, "be short", sampling={"max_new_tokens": 12})
    chat.say("say one")
    second = chat.say("say two").text
    (alone,) = lit_lora.generate(loaded, chat.messages[:-1], format="chat", max_new_tokens=12)
    assert second == alone.text
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.undo() == "say two"
    assert len(chat.turns) == 2


def test_the_adapter_is_switched_off_and_on(said) -> None:
    out, err = said("say one", "/undo", "/adapter off", "say one", "/undo", "/adapter on", "say one")
    first, *without, last = out.splitlines()
    assert first == last == "yes"
    assert "".join(without) != "yes"
    assert "the adapter is off" in err
    assert "the adapter is on" in err


def test_a_conversation_is_kept_as_training_data(said, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    said("/system be short", "say one", f"/save {file}", "/new", "say four", f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["messages"][0] == {"role": "system", "content": "be short"}
    assert rows[1]["messages"][1:] == [
        {"role": "user", "content": "say four"},
        {"role": "assistant", "content": rows[1]["messages"][2]["content"]},
    ]
    from lit_lora.data.datamodule import SFTDataModule

    data = SFTDataModule(str(file), tokenizer="bytes", cache_dir=tmp_path / "cache")
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_data) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "no command '/hlep': did you mean '/help'?"),
        ("/undo", "nothing has been said yet"),
        ("/again", "nothing has been said yet"),
        ("/adapter maybe", "/adapter takes NAME, on or off: no adapter 'maybe'; there are 'run'"),
        ("/temperature warm", "/temperature takes a number, got 'warm'"),
        ("/temperature -1", "expected temperature >= 0"),
        ("/save", "/save takes the name of a file"),
        ("/save kept.jsonl", "nothing has been said yet"),
    ],
)
def test_a_mistake_ends_no_conversation(line: str, message: str, said) -> None:
    out, err = said(line, "say one")
    assert message in err
    assert out == "yes\n"


def test_help_lists_every_command_and_quit_ends(said) -> None:
    out, err = said("/help", "/quit", "say one")
    assert out == ""
    assert all(name in err for name in ("/new", "/undo", "/again", "/adapter", "/system", "/temperature", "/save"))


def test_ctrl_c_takes_the_turn_back(adapter: Path, monkeypatch, capsys) -> None:
    chat = Chat(lit_lora.load(str(adapter)), sampling={"max_new_tokens": 12})

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    talk = verb._Talk(chat, stream=False)
    with monkeypatch.context() as patch:
        patch.setattr("lit_lora.evaluation.chat.generate", interrupted)
        assert talk.take("say two")
    assert chat.turns == []
    assert "that turn is taken back" in capsys.readouterr().err
    assert talk.take("say one")
    assert capsys.readouterr().out == "yes\n"


def test_again_answers_the_last_turn_again(said) -> None:
    assert said("say one", "/again", "/again")[0] == "yes\n" * 3


def test_a_cut_answer_says_so(said) -> None:
    assert "cut at max_new_tokens=1" in said("say two", max_new_tokens=1)[1]
