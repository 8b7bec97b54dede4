"""Settings, losses and verdict of a run in trackers, each read back by what reads it."""

from __future__ import annotations

import csv
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lit_lora.callbacks.verdict import Verdict
from lit_lora.report.outcome import Outcome
from lit_lora.runs.trackers import verdict_metrics
from tests.promises.sentences import PROJECT
from tests.started_runs import fit, make_base, questions

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
STEPS = 12


class Told(NamedTuple):
    """What a tracker knows of a run."""

    settings: dict[str, str]
    """By the end of its name, as text."""
    metrics: dict[str, list[float]]


def tensorboard(folder: Path) -> Told:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tb"))
    events.Reload()
    metrics = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("verdict/text_summary")
    result, _, reasons = text.tensor_proto.string_val[0].decode().partition(": ")
    settings = _flat(yaml.safe_load((folder / "tb" / "hparams.yaml").read_text()))
    return Told(settings | {"result": result, "reasons": reasons}, metrics)


def csv_files(folder: Path) -> Told:
    (place,) = folder.glob("csv/version_0")
    with (place / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
    return Told(_flat(yaml.safe_load((place / "hparams.yaml").read_text())), metrics)


def mlflow(folder: Path) -> Told:
    tracking = pytest.importorskip("mlflow.tracking")
    client = tracking.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    names = run.data.metrics
    metrics = {name: [m.value for m in client.get_metric_history(run.info.run_id, name)] for name in names}
    return Told({name.replace("/", "."): value for name, value in run.data.params.items()}, metrics)


def wandb(folder: Path) -> Told:
    """The file of an offline run, which ``wandb sync`` sends: protocol buffers in LevelDB's log format."""
    protobuf = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    package = pytest.importorskip("wandb")
    package.finish()
    package.teardown()  # which would keep the folder for the next run of this process
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    settings: dict[str, str] = {}
    metrics: dict[str, list[float]] = {}
    for written in _leveldb_records(path.read_bytes()):
        record = protobuf.Record.FromString(written)
        for item in (*record.run.config.update, *record.config.update):
            settings |= _flat({item.key or ".".join(item.nested_key): json.loads(item.value_json)})
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                metrics.setdefault(item.key or "/".join(item.nested_key), []).append(float(value))
    return Told(settings, metrics)


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    place, record, header, block = 7, b"", struct.Struct("<IHB"), 1 << 15
    while place + header.size <= len(content):
        if block - place % block < header.size:
            place += block - place % block
            continue
        _, length, kind = header.unpack_from(content, place)
        place += header.size + length
        record += content[place - length : place]
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def _flat(content: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(content, dict):
        return {prefix: str(content)}
    return {k: v for name, value in content.items() for k, v in _flat(value, f"{prefix}.{name}".strip(".")).items()}


TRACKERS: dict[str, tuple[str, Callable[[Path], Told]]] = {
    "TensorBoardLogger": ("tensorboard", tensorboard),
    "CSVLogger": ("csv", csv_files),
    "MLFlowLogger": ("mlflow", mlflow),
    "WandbLogger": ("wandb", wandb),
}


def page_config(kind: str, folder: Path) -> dict[str, Any]:
    """The YAML of the docs page for a single logger."""
    blocks = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs" / "trackers.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.count("class_path") == 1 and f"loggers.{kind}" in block]
    return yaml.safe_load(found.replace("sqlite:///", f"sqlite:///{folder}/"))  # of which MLflow keeps the connection


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    make_base(folder / "base")
    questions(folder / "questions.jsonl")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("outcome", ["proved", "not proved"])
@pytest.mark.parametrize("kind", TRACKERS)
def test_a_tracker_is_told_settings_losses_and_verdict(place, tmp_path, monkeypatch, kind, outcome):
    package, read = TRACKERS[kind]
    if package != "csv":
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tracker.yaml").write_text(yaml.safe_dump(page_config(kind, tmp_path)))
    fall = 0.999 if outcome == "not proved" else 0.0
    options: dict[str, object] = {
        "config": tmp_path / "tracker.yaml",
        "convergence__min_decrease": fall,
        "trainer__log_every_n_steps": 3,
        "checkpoint__keep_last": 1,
    }
    arguments = (str(place / "base"), str(place / "questions.jsonl"), tmp_path / "run")
    if outcome == "proved":
        fit(*arguments, max_steps=STEPS, **options)
    else:
        with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="convergence: loss fell"):
            fit(*arguments, max_steps=STEPS, **options)
        assert ended.value.code == 3
    told = read(tmp_path)
    settings = {name.rpartition(".")[2]: value for name, value in told.settings.items()}
    assert settings["learning_rate"] == "0.02"
    assert settings["max_steps"] == str(STEPS)
    assert settings["result"] == outcome
    assert settings["reasons"] == ("" if outcome == "proved" else "convergence")
    assert len(told.metrics["train_loss"]) == STEPS // 3
    assert told.metrics["val_loss"]
    assert told.metrics["verdict/proved"] == [float(outcome == "proved")]
    assert told.metrics["verdict/convergence"] == [float(outcome == "proved")]
    assert told.metrics["verdict/gradient_flow"] == [1.0]
    assert told.metrics["verdict/failed_checks"] == [float(outcome != "proved")]


def test_a_check_without_a_judgement_is_no_number():
    verdicts = [Verdict("a check", True, ""), Verdict("another", None, ""), Verdict("third", False, "")]
    assert verdict_metrics(Outcome(3, verdicts)) == {
        "verdict/proved": 0.0, "verdict/failed_checks": 1.0, "verdict/a_check": 1.0, "verdict/third": 0.0,
    }  # fmt: skip
    assert verdict_metrics(Outcome(3, verdicts[:2]))["verdict/proved"] == 0.0
    assert verdict_metrics(Outcome(3, verdicts[:1]))["verdict/proved"] == 1.0


def test_a_tracker_that_cannot_be_reached_costs_no_verdict(place, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    def unreachable(self, metrics, step=None):
        if "verdict/proved" in metrics:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(CSVLogger, "log_metrics", unreachable)
    with pytest.warns(UserWarning, match="The verdict did not reach PatientCSVLogger: ConnectionError"):
        fit(str(place / "base"), str(place / "questions.jsonl"), tmp_path / "run", max_steps=STEPS)
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["result"] == "proved"
