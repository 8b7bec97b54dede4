"""Answers of a batch that is kept full are those of each prompt alone, and cost no rows that are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.chats.turn_end import TurnEnd
from lit_lora.language_model import full_batches, generation
from lit_lora.language_model.full_batches import can_be_kept_full
from lit_lora.language_model.generation import complete
from tests.tiny import language_model

KEPT_FULL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {"alibi": True, "new_decoder_architecture": False},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
}
OTHERS: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Phi3": {"pad_token_id": 0},
    "Mamba": {"state_size": 4},
}
STOPS = list(range(0, 260, 9))
PROMPTS = [[5 + index, *(3 + (index * 7 + place) % 250 for place in range(index % 6))] for index in range(11)]
BEGINNING = [11, 200, 3, 42] * 6


def answers(
    model: Any,
    *,
    batch_size: int | None,
    end: TurnEnd,
    max_new_tokens: int = 20,
    prompts: list[list[int]] = PROMPTS,
    **options: Any,
) -> list[Any]:
    return complete(
        model, byte_tokenizer(), prompts, end=end, batch_size=batch_size, max_new_tokens=max_new_tokens, **options
    )


def adapted(kind: str, fields: dict[str, Any]) -> Any:
    model = language_model(kind, **{"vocab_size": 260, **fields})
    exclude = ["out_proj", "dt_proj"] if kind == "Mamba" else None
    adapters = LoRAConfig(r=2, target_modules="all-linear", exclude_modules=exclude, init_lora_weights=False)
    inject_lora(model, adapters)
    return model.eval()


@pytest.mark.filterwarnings("ignore:not adapted")  # experts
@pytest.mark.parametrize("kind", [*KEPT_FULL, *OTHERS])
@pytest.mark.parametrize("strings", [(), ("e", "zz")])
@pytest.mark.parametrize("beginning", [[], BEGINNING])
def test_answers_are_those_of_generate(kind, strings, beginning, monkeypatch):
    monkeypatch.setattr(full_batches, "_ROOM", 3)  # is used up and made anew
    model = adapted(kind, (KEPT_FULL | OTHERS)[kind])
    end = TurnEnd(STOPS[:8] if strings else STOPS, strings)
    prompts = [[*beginning, *prompt] for prompt in PROMPTS]
    got = answers(model, batch_size=4, end=end, prompts=prompts)
    assert can_be_kept_full(model) == (kind in KEPT_FULL)
    monkeypatch.setattr(generation, "can_be_kept_full", lambda model: False)
    assert got == answers(model, batch_size=1, end=end, prompts=prompts)
    assert len({len(answer.text) for answer in got}) > 1


@pytest.mark.parametrize("kind", KEPT_FULL)
@pytest.mark.filterwarnings("ignore:not adapted")  # experts
def test_prompts_of_one_length_need_no_mask_and_see_what_they_share(kind, monkeypatch):
    model = adapted(kind, KEPT_FULL[kind])
    prompts = [[*BEGINNING, 5 + index, 90, 7 * index] for index in range(8)]
    got = answers(model, batch_size=8, end=TurnEnd(STOPS[:8], ()), prompts=prompts)
    monkeypatch.setattr(generation, "can_be_kept_full", lambda model: False)
    assert got == answers(model, batch_size=1, end=TurnEnd(STOPS[:8], ()), prompts=prompts)


def test_what_prompts_begin_with_is_read_once_for_those_that_enter_together():
    model = adapted("Llama", {})
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    prompts = [[*BEGINNING, *prompt] for prompt in PROMPTS]
    answers(model, batch_size=4, end=TurnEnd(STOPS, ()), max_new_tokens=1, prompts=prompts)
    assert [shape[0] for shape in seen] == [1, 4, 1, 4, 3]  # two passes would cost three prompts more than one saves
    assert [shape[1] for shape in seen if shape[0] == 1] == [len(BEGINNING)] * 2
    seen.clear()
    answers(model, batch_size=4, end=TurnEnd(STOPS, ()), max_new_tokens=1)  # nothing shared
    assert [shape[0] for shape in seen] == [4, 4, 3]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([20, 21, 22, 60, 62, 64], [(3, 22), (3, 64)]),
        ([64, 21, 60, 22, 62, 20], [(3, 22), (3, 64)]),  # in whatever order they are asked
        ([20] * 6, [(6, 20)]),
        ([20, 22, 22, 22], [(4, 22)]),  # too little would be padded
        ([2, 8, 30], [(2, 8), (1, 30)]),  # too few tokens for a product of its own
        ([30], [(1, 30)]),
    ],
)
def test_prompts_are_read_with_those_of_their_length(lengths, expected, monkeypatch):
    monkeypatch.setattr(full_batches, "_ENOUGH_TOKENS", 32)
    model, seen = adapted("Llama", {}), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[(5 + 3 * index + 7 * place) % 250 for place in range(length)] for index, length in enumerate(lengths)]
    got = answers(model, batch_size=8, end=TurnEnd([], ()), max_new_tokens=4, prompts=prompts)
    assert seen == [*expected, *[(len(lengths), 1)] * 3]
    monkeypatch.setattr(full_batches, "_ENOUGH_TOKENS", 2**20)
    assert got == answers(model, batch_size=8, end=TurnEnd([], ()), max_new_tokens=4, prompts=prompts)


@pytest.mark.parametrize(("length", "rows"), [(100, 128), (1000, 16), (9000, 4)])
def test_as_many_prompts_at_a_time_as_have_room(length, rows, monkeypatch):
    entered: list[int] = []

    class Noted(full_batches._Batch):
        def enter(self, rows: list[Any]) -> None:
            entered.append(len(rows))
            for row in rows:
                row.answer.append(STOPS[0])
            self.rows = list(rows)

        def keep(self, places: list[int]) -> None:
            self.rows = [self.rows[place] for place in places]

    monkeypatch.setattr(full_batches, "_Batch", Noted)
    prompts = [[5] * length] * 300
    answers(adapted("Llama", {}), batch_size=None, end=TurnEnd(STOPS, ()), max_new_tokens=20, prompts=prompts)
    assert entered[0] == rows
    assert sum(entered) == 300


def test_no_row_is_computed_after_its_answer(monkeypatch):
    model = adapted("Llama", {})
    end, rows, done = TurnEnd(STOPS, ()), [], []
    model.model.register_forward_hook(lambda _, args, kwargs, out: rows.append(out[0].shape[0]), with_kwargs=True)
    got = answers(model, batch_size=4, end=end, progress=done.append)
    here, at_most = sum(rows), max(rows)
    assert at_most == 4
    assert done == sorted(set(done))
    assert done[-1] == len(PROMPTS)
    rows.clear()
    alone = answers(model, batch_size=1, end=end)
    assert alone == got
    assert here == sum(rows)
    rows.clear()
    monkeypatch.setattr(generation, "can_be_kept_full", lambda model: False)
    answers(model, batch_size=4, end=end)
    assert sum(rows) > here


def test_sampling_and_shown_answers_are_left_to_generate(monkeypatch):
    model = adapted("Llama", {})
    monkeypatch.setattr(generation, "complete_in_full_batches", lambda *_, **__: pytest.fail("kept full"))
    torch.manual_seed(0)
    assert len(answers(model, batch_size=4, end=TurnEnd(STOPS, ()), temperature=1.0)) == len(PROMPTS)
