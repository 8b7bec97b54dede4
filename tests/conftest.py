"""What tests of several folders share: the real model (skipped where missing), data, an environment each."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before the first product: `auto` holds a base in float32 on every machine, also in the processes that tests start.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

from lit_lora.base.known_models import model_folder
from tests.started_runs import lit_lora

REAL_MODEL = "smollm2-135m-instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also compare every architecture (about two minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the sweep out unless it is asked for, whatever else selects tests."""
    if not config.getoption("--sweep"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="compares every architecture: pytest --sweep"))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test leaves in ``os.environ`` ends with it.

    A Trainer with a ddp strategy leaves ``LOCAL_RANK``, and a later one then waits for ranks that nobody starts.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page of a run takes a second, which only tests of it spend."""
    if request.node.get_closest_marker("report") is None:
        monkeypatch.setattr("lit_lora.runs.run_record.RunRecord._write_report", lambda *_: None)


@pytest.fixture(scope="session")
def real_model() -> str:
    """Name of the fetched SmolLM2-135M-Instruct."""
    if not (model_folder(REAL_MODEL) / "config.json").is_file():
        pytest.skip(f"run `lit-lora fetch {REAL_MODEL}` first")
    return REAL_MODEL


@pytest.fixture(scope="session")
def requests() -> Path:
    """The quickstart's data: 1000 requests in plain English with their JSON."""
    return Path(__file__).parents[1] / "configs" / "data" / "requests_train.jsonl"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Runs the command line with what comes over a pipe: (stdout, stderr)."""

    def said(*arguments: object, stdin: str = "", **options: object) -> tuple[str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        lit_lora(*arguments, **options)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return said
