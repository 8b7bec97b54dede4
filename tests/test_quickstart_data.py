from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "data"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_requests", FOLDER / "make_requests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


TRAIN, TEST = read("requests_train.jsonl"), read("requests_test.jsonl")


def test_generator_reproduces_the_shipped_files(generator: ModuleType, tmp_path: Path) -> None:
    generator.write(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["requests_test.jsonl", "requests_train.jsonl"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), (
            "run python configs/data/make_requests.py"
        )


def test_another_seed_makes_other_requests(generator: ModuleType) -> None:
    assert generator.make(seed=1)[0] != generator.make(seed=0)[0]


def test_sizes_and_an_equal_share_of_each_intent(generator: ModuleType) -> None:
    for examples, num in ((TRAIN, 1000), (TEST, 100)):
        intents = [json.loads(messages[-1]["content"])["intent"] for messages in examples]
        assert len(examples) == num
        assert {intent: intents.count(intent) for intent in intents} == dict.fromkeys(generator.INTENTS, num // 10)


def test_training_and_test_share_no_request_and_no_answer() -> None:
    for role in (1, 2):
        train, test = ([messages[role]["content"] for messages in examples] for examples in (TRAIN, TEST))
        assert len(test) == 100
        assert not set(train) & set(test)
    assert len({messages[1]["content"] for messages in TRAIN + TEST}) == 1100


def test_answers_are_compact_json_with_the_intents_fields_in_order(generator: ModuleType) -> None:
    for system, user, assistant in TRAIN + TEST:
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        assert system["content"] == generator.SYSTEM_PROMPT
        answer = json.loads(assistant["content"])
        assert json.dumps(answer, separators=(",", ":")) == assistant["content"]
        fields = ["intent", *generator.INTENTS[answer["intent"]].fields]
        assert list(answer) == [name for name in fields if name in answer]
        assert len(answer) >= 2


@pytest.mark.parametrize(
    ("intent", "field"),
    [
        ("set_alarm", "time"),
        ("set_timer", "label"),
        ("add_event", "title"),
        ("add_event", "time"),
        ("send_message", "to"),
        ("send_message", "text"),
        ("play_music", "artist"),
        ("get_weather", "city"),
        ("order_food", "item"),
        ("set_lights", "room"),
        ("set_lights", "brightness"),
        ("convert_units", "value"),
    ],
)
def test_values_of_open_fields_are_new_in_the_test_set(intent: str, field: str) -> None:
    train, test = (
        {a[field] for a in (json.loads(m[-1]["content"]) for m in examples) if a["intent"] == intent and field in a}
        for examples in (TRAIN, TEST)
    )
    assert len(test) >= 2
    assert not train & test


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("half past six in the evening", "18:30"),
        ("quarter to eight in the morning", "07:45"),
        ("one in the afternoon", "13:00"),
        ("noon", "12:00"),
        ("midnight", "00:00"),
        ("12:30 am", "00:30"),
        ("7 pm", "19:00"),
    ],
)
def test_times_mean_what_they_say(generator: ModuleType, said: str, expected: str) -> None:
    """Among all that the generator says, the phrase stands for one time only, the right one."""
    random = Random(0)
    pairs = {generator.clock_time(random, held_out) for held_out in (False, True) for _ in range(10_000)}
    assert {value for text, value in pairs if text == said} == {expected}
