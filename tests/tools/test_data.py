"""``lit-lora data``: the data options of ``fit``, one clear error each, and no colours in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_lora import inspect_data
from lit_lora.__main__ import main
from tests.terminal import terminal
from tests.tiny import config

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

MODEL = ["--model", "random:tiny.json", "--tokenizer", "bytes"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    monkeypatch.delenv("NO_COLOR", raising=False)
    config("Llama", vocab_size=260, max_position_embeddings=512).to_json_file("tiny.json")
    rows = [{"asked": f"say {i}", "said": "it is " + "x" * i} for i in range(30)]
    Path("named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"say {i}", "completion": "it is " + "x" * i} for i in range(30)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def shown(capsys, *arguments: str) -> str:
    main(["data", *arguments])
    return capsys.readouterr().out


def test_it_prints_what_python_returns(capsys) -> None:
    out = shown(capsys, "my.jsonl", *MODEL)
    report = inspect_data("my.jsonl", "random:tiny.json", tokenizer="bytes")
    assert out == f"{report}\n"
    assert "my.jsonl (prompt_completion): looked at all 30 rows" in out
    assert "  | 〕it is <eos>■" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["named.jsonl", *MODEL, "--columns", '{"prompt": "asked", "completion": "said"}', "--max_length=40"],
        [*MODEL, "--data.max_length", "40", "named.jsonl", "--data.columns={prompt: asked, completion: said}"],
        ["--config", "fit.yaml", "--data.train", "named.jsonl"],
        ["named.jsonl", "-c", "fit.yaml"],
        ["-c", "fit.yaml", "named.jsonl", "--model.base", "random:tiny.json", "--max_length", "40"],
    ],
    ids=["short names", "names of fit", "a config", "a config and a file", "a config and options"],
)
def test_options_are_those_of_fit(capsys, arguments) -> None:
    Path("fit.yaml").write_text(
        "model: {base: 'random:tiny.json', lora: {r: 4}}\ntrainer: {max_steps: 3}\n"
        "data: {train: my.jsonl, tokenizer: bytes, max_length: 40, columns: {prompt: asked, completion: said}}\n"
    )
    out = shown(capsys, *arguments)
    assert "named.jsonl (prompt_completion): looked at all 30 rows" in out
    assert re.search(r"^ +40 .*<- as it is set$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my.csv", "prompt,completion\nhi,there\n"),
        ("one.json", '["my.jsonl"]'),
        ("two.json", '[{"path": "my.jsonl"}]'),
        ("three.json", '[{"prompt": "hi", "completion": "there"}]'),
    ],
)
def test_a_file_of_data_is_never_read_as_a_setting(capsys, name, text) -> None:
    Path(name).write_text(text)
    Path("fit.yaml").write_text(f"data: {{train: {name}}}\n")
    for given in (["fit", "--data.train", name], ["fit", "--config", "fit.yaml"]):
        with pytest.raises(SystemExit) as ended:
            main([*given, "--model.base=random:tiny.json", "--trainer.max_steps=1", "--print_config"])
        assert not ended.value.code
        assert yaml.safe_load(capsys.readouterr().out)["data"]["train"] == name


def test_rows_and_examples_are_limited(capsys) -> None:
    out = shown(capsys, "my.jsonl", *MODEL, "--rows", "7", "--examples", "1")
    assert "looked at the first 7 rows, and there are more" in out
    assert out.count("<eos>■") == 1
    assert "looked at all 30 rows" in shown(capsys, "my.jsonl", *MODEL, "--rows", "all", "--examples=0")


def test_the_suggestion_is_a_config_of_fit(capsys) -> None:
    out = shown(capsys, "named.jsonl", *MODEL, "--columns", '{"prompt": "asked", "completion": "said"}')
    Path("pasted.yaml").write_text(out.rpartition("for a file given with --config:\n")[2])
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "pasted.yaml", "--trainer.max_steps=1", "--print_config"])
    assert not ended.value.code
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["base"] == "random:tiny.json"
    chosen = {"train": "named.jsonl", "columns": {"prompt": "asked", "completion": "said"}, "max_length": 64}
    assert settings["data"].items() >= (chosen | {"tokenizer": "bytes", "packing": True}).items()


def test_several_sources_of_a_config_are_looked_at(capsys) -> None:
    Path("two.yaml").write_text(
        "model: {base: 'random:tiny.json'}\n"
        "data:\n  tokenizer: bytes\n  train:\n    - {path: my.jsonl, weight: 0.75}\n"
        "    - {path: named.jsonl, weight: 0.25, columns: {prompt: asked, completion: said}}\n"
    )
    out = shown(capsys, "--config", "two.yaml")
    assert re.search(r"^  my.jsonl +1,415 +50.0%  75.0% of an epoch's; weight 0.75$", out, re.MULTILINE), out
    assert "named.jsonl (prompt_completion): looked at all 30 rows" in out
    Path("pasted.yaml").write_text(out.rpartition("for a file given with --config:\n")[2])
    again = shown(capsys, "--config", "pasted.yaml")
    assert [line for line in again.splitlines() if "of an epoch's" in line] == [
        line for line in out.splitlines() if "of an epoch's" in line
    ]


def test_validation_data_are_looked_at(capsys) -> None:
    Path("held.jsonl").write_text('{"prompt": "a", "completion": "b", "id": 1}\n{"prompt": "only"}\n')
    out = shown(capsys, "my.jsonl", *MODEL, "--validation", "held.jsonl", "--html", "page.html")
    assert "for validation: held.jsonl (prompt_completion): looked at all 2 rows\n  1 example, " in out
    assert "1 times: column 'id' is not used" in out
    assert "1 row cannot be used" in out
    assert "held.jsonl:2" in out
    assert "training refuses data with rows that cannot be used" in out
    assert (
        inspect_data("my.jsonl", "random:tiny.json", tokenizer="bytes").lengths
        == inspect_data("my.jsonl", "random:tiny.json", tokenizer="bytes", validation="held.jsonl").lengths
    )
    page = Path("page.html").read_text()
    assert "held.jsonl, for validation" in page
    assert "no field &#39;completion&#39;" in page


@pytest.mark.parametrize(
    ("fraction", "told"),
    [
        ("0.1", "set aside for validation: 3 of these 30 examples"),
        ("0.01", "training refuses to set 0 of the 30 examples of my.jsonl aside"),
    ],
)
def test_what_is_set_aside_for_validation_is_told(capsys, fraction, told) -> None:
    assert told in shown(capsys, "my.jsonl", *MODEL, "--validation_fraction", fraction)


def test_files_are_written(capsys) -> None:
    main(["data", "my.jsonl", *MODEL, "--json", "new/found.json", "--html=page.html"])
    assert capsys.readouterr().err == "wrote new/found.json\nwrote page.html\n"
    report = inspect_data("my.jsonl", "random:tiny.json", tokenizer="bytes")
    assert json.loads(Path("new/found.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert Path("page.html").read_text() == report.html()


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, variables, coloured) -> None:
    with terminal(monkeypatch, 200, name=variables.pop("TERM", "xterm")) as screen:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        main(["data", "my.jsonl", *MODEL])
    report = inspect_data("my.jsonl", "random:tiny.json", tokenizer="bytes")
    assert ("\033[32m" in screen.written) is coloured
    assert re.sub(r"\033\[\d+m", "", screen.written).replace("\r\n", "\n") == f"{report}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "missing: FILE (see lit-lora data --help)"),
        (["nowhere.jsonl", *MODEL], 2, "data.train: no data file at nowhere.jsonl"),
        (["empty.jsonl", *MODEL], 2, "data.train: empty.jsonl is empty: expected at least one row of data"),
        (["tiny.json", *MODEL], 1, "tiny.json is one JSON object with the keys"),
        (["nothing.json", *MODEL], 1, "nothing.json holds no examples: expected at least one row of data"),
        (["latin.csv", *MODEL], 1, "latin.csv:2: not UTF-8"),
        (["my.jsonl", *MODEL, "--format", "alpaca"], 1, "do not fit the format 'alpaca'"),
        (["my.jsonl", "--model", "./nowhere"], 2, "model.base: no model folder './nowhere'"),
        (["my.jsonl", "--model", "random:tiny.json"], 1, "has no tokenizer of its own: set data.tokenizer"),
        (["my.jsonl", *MODEL, "--rows", "0"], 2, "argument --rows: expected a whole number of at least 1, got '0'"),
        (["my.jsonl", *MODEL, "--examples", "x"], 2, "argument --examples: expected a whole number of at least 0"),
        (["my.jsonl", *MODEL, "--formt", "text"], 2, "no option --formt, did you mean '--format'?"),
        (["my.jsonl", *MODEL, "--lr", "1"], 2, "no setting 'lr': here it is 'model.optimization.learning_rate'"),
        (["my.jsonl", "more.jsonl", *MODEL], 2, "more.jsonl"),
        (["my.jsonl", *MODEL, "--html", "folder"], 2, "folder is a folder: give the name of a file to write"),
        (["my.jsonl", *MODEL, "--max_length", "1"], 2, "max_length must be at least 2 tokens, got 1"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_error(capsys, arguments, code, told) -> None:
    Path("empty.jsonl").touch()
    Path("nothing.json").write_text("[]")
    Path("latin.csv").write_bytes("prompt,completion\nä,b\n".encode("latin-1"))
    Path("folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["data", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == code
    assert told in said.err
    assert said.err.count("error: ") == 1
    assert said.out == ""


def test_data_of_bad_rows_only_is_shown_and_fails(capsys) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": ""}\nno\n')
    with pytest.raises(SystemExit) as ended:
        main(["data", "bad.jsonl", *MODEL])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "2 rows cannot be used" in out
    assert "bad.jsonl:2" in out
    assert "suggested" not in out


def test_a_reader_that_leaves_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lit_lora", "data", "my.jsonl", *MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
