"""A conversation with a model: its turns so far, and the next answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_lora.adapters.named_adapters import adapter_names, check_names
from lit_lora.evaluation.generate import BASE, generate
from lit_lora.evaluation.load import Loaded
from lit_lora.language_model.generation import Completion


@dataclass
class Chat:
    """Turns with a model; each answer goes on from all of them.

    Args:
        loaded: from :func:`lit_lora.load`.
        system: system message before the first turn.
        adapter: name of the one that answers; None for the base alone. By default the first of the model.
        sampling: ``max_new_tokens``, ``temperature``, ``top_p`` and ``seed`` of :func:`lit_lora.generate`.
    """

    loaded: Loaded
    system: str | None = None
    adapter: str | None = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    """Of user and assistant in turn."""

    def __post_init__(self) -> None:
        self.adapter = self.adapter or next(iter(self.adapters), None)

    @property
    def adapters(self) -> list[str]:
        """Names of all that can answer, in the order in which they were loaded."""
        there = adapter_names(self.loaded.model)
        loaded = [name for name in self.loaded.adapters if name in there]
        return [*loaded, *(name for name in there if name not in loaded)]

    def switch(self, name: str | None) -> None:
        """Let another adapter answer from here on; the conversation stays.

        Args:
            name: None for the base alone.

        Raises:
            ValueError: if there is none of that name.
        """
        check_names(self.loaded.model, [] if name is None else [name])
        self.adapter = name

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, as training data has it."""
        before = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*before, *self.turns]

    def say(self, text: str, *, stream: bool = False) -> Completion:
        """The answer to what the user says next; both are turns from then on.

        Args:
            text: of the user.
            stream: print the answer as it comes.

        Raises:
            ValueError: if the conversation has become longer than the model reads, or its template refuses it.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self._answer(stream)
        except BaseException:  # also Ctrl-C: what has no answer was not said
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer.text})
        return answer

    def again(self, *, stream: bool = False) -> Completion:
        """Another answer in place of the last one.

        Raises:
            ValueError: if there is none.
        """
        text = self.undo()
        return self.say(text, stream=stream)

    def undo(self) -> str:
        """Take back the last thing said, and its answer.

        Returns:
            What was said.

        Raises:
            ValueError: if nothing was.
        """
        if not self.turns:
            raise ValueError("nothing has been said yet")
        del self.turns[-1]
        return self.turns.pop()["content"]

    def _answer(self, stream: bool) -> Completion:
        who = self.adapter or (BASE if self.adapters else None)
        return generate(self.loaded, self.messages, adapter_names=who, format="chat", stream=stream, **self.sampling)[0]
