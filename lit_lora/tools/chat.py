"""``lit-lora chat``: a conversation on the terminal, or line by line over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_lora.config import QuantizationConfig
from lit_lora.files.meant import closest, did_you_mean

if TYPE_CHECKING:
    from lit_lora.evaluation.chat import Chat
    from lit_lora.language_model.generation import Completion

PROMPT = "> "


def chat(
    adapter: list[str] | str | None = None,
    base: str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Talk to a model: each line is a turn, its answer the next; /help lists the commands.

    Answers are on stdout, everything else on stderr. From a pipe each line of standard input is a turn, too.

    Args:
        adapter: folder of an adapter in PEFT's format, or NAME=FOLDER; of several /adapter NAME chooses.
        base: base model, as in --model.base; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights; by default as the adapter was trained, and auto without an adapter.
        tokenizer: name or folder of another tokenizer than that of the adapter, or of the base without one.
        system: system message before the first turn.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        seed: seed for sampling.
        stream: print tokens as they come.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.evaluation.chat import Chat
    from lit_lora.evaluation.generate import check_sampling, continues_text
    from lit_lora.evaluation.load import load
    from lit_lora.runs.said import readable

    check_sampling(temperature, top_p, seed, max_new_tokens)
    with readable():
        loaded = load(
            [adapter] if isinstance(adapter, str) else adapter,
            base=base,
            revision=revision,
            quantization=quantization,
            full_precision=full_precision,
            dtype=dtype,
            tokenizer=tokenizer,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    if of_text := [name for name, asked in loaded.adapters.items() if continues_text(asked.trained_on, "auto")]:
        which = "the adapter" if len(loaded.adapters) == 1 else ", ".join(of_text)
        _note(f"{which} was trained on plain text, and is asked in the chat template")
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk = _Talk(Chat(loaded, system, sampling=sampling), stream=stream)
    if len(talk.chat.adapters) > 1:
        _note(f"{talk.chat.adapter} answers; /adapter NAME switches to another of {', '.join(talk.chat.adapters)}")
    if sys.stdin.isatty():
        _note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    for line in _lines():
        if not talk.take(line):
            break


class _Talk:
    """Lines in, answers and notes out."""

    def __init__(self, chat: Chat, *, stream: bool) -> None:
        self.chat = chat
        self.last = chat.adapter
        self.stream = stream
        self.commands: dict[str, tuple[Callable[[str], object], str]] = {
            "/help": (self._help, "this list"),
            "/new": (self._new, "forget what was said"),
            "/undo": (self._undo, "take back the last turn and its answer"),
            "/again": (self._again, "answer the last turn again"),
            "/adapter": (
                self._adapter,
                "NAME, on or off: answer with that one, the last one, or as the base; alone lists them",
            ),
            "/system": (self._system, "TEXT: the system message from here on; none without TEXT"),
            "/temperature": (self._temperature, "NUMBER: 0 for the most likely token each time"),
            "/save": (self._save, "FILE: add the conversation to it as a line of JSON, as training reads it"),
            "/quit": (lambda _: None, "end, as Ctrl-D does"),
        }

    def take(self, line: str) -> bool:
        """One line; whether to go on."""
        text = line.strip()
        word, _, rest = text.partition(" ")
        if not text:
            return True
        if word == "/quit":
            return False
        try:
            if not text.startswith("/"):
                self._show(lambda: self.chat.say(text, stream=self.stream))
            elif word in self.commands:
                self.commands[word][0](rest.strip())
            else:
                hint = did_you_mean(closest(word, self.commands)) or "/help lists the commands"
                _note(f"no command {word!r}: {hint}")
        except (ValueError, OSError) as error:
            _note(str(error))
        except KeyboardInterrupt:
            _note("stopped: that turn is taken back")
        return True

    def _show(self, ask: Callable[[], Completion]) -> None:
        from lit_lora.language_model.generation import cut_note

        answer = ask()
        if not self.stream:
            print(answer.text, flush=True)
        if note := cut_note([answer], self.chat.sampling["max_new_tokens"]):
            _note(note)

    def _help(self, _: str) -> None:
        for name, (_command, text) in self.commands.items():
            _note(f"  {name:<14}{text}")

    def _new(self, _: str) -> None:
        self.chat.turns.clear()
        _note("nothing has been said")

    def _undo(self, _: str) -> None:
        _note(f"taken back: {self.chat.undo()}")

    def _again(self, _: str) -> None:
        self._show(lambda: self.chat.again(stream=self.stream))

    def _adapter(self, wanted: str) -> None:
        if not self.chat.adapters:
            raise ValueError("there is no adapter: start with --adapter FOLDER")
        if not wanted:
            for name in [*self.chat.adapters, None]:
                _note(f"{'>' if name == self.chat.adapter else ' '} {name or 'off: the base alone'}")
            return
        name = {"on": self.last, "off": None}.get(wanted, wanted)
        try:
            self.chat.switch(name)
        except ValueError as error:
            raise ValueError(f"/adapter takes NAME, on or off: {error}") from None
        self.last = name or self.last
        _note("the adapter is off" if name is None else f"the adapter is on: {name}")

    def _system(self, text: str) -> None:
        self.chat.system = text or None
        _note(f"system message: {text or 'none'}")

    def _temperature(self, text: str) -> None:
        from lit_lora.evaluation.generate import check_sampling

        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"/temperature takes a number, got {text!r}") from None
        top_p = self.chat.sampling["top_p"] if value else 1.0
        check_sampling(value, top_p, None, self.chat.sampling["max_new_tokens"])
        self.chat.sampling |= {"temperature": value, "top_p": top_p}
        _note(f"temperature {value:g}")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save takes the name of a file")
        if not self.chat.turns:
            raise ValueError("nothing has been said yet")
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.chat.messages}, ensure_ascii=False) + "\n")
        _note(f"added to {name}: lit-lora fit reads it as training data")


def _lines() -> Iterator[str]:
    """What is typed, until Ctrl-D, or what a pipe holds."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # lets input() edit a line, and bring back earlier ones

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
