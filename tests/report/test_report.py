"""The page of a run: what ``fit`` leaves at its end, what it shows, and what it makes of a damaged folder."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lit_lora.report.charts import gradient_chart
from lit_lora.report.page import FILE_NAME, write_report
from lit_lora.report.run_files import read_run
from tests.started_runs import fit, lit_lora, make_base, write_rows

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ROWS = [
    {"prompt": f"say <b>{word}</b> & go", "completion": f"<script>alert('{word}')</script>"} for word in ("one", "two")
] * 4

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Which elements a page has, what they refer to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(a.removeprefix(prefix)).decode() for a in self.addresses if a.startswith(prefix)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, without a page."""
    folder = tmp_path_factory.mktemp("made")
    fit(base, write_rows(folder / "rows.jsonl", ROWS), folder / "run", max_steps=6, trainer__log_every_n_steps=2)
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.report
@pytest.mark.filterwarnings("ignore:convergence:UserWarning")
@pytest.mark.parametrize("wanted", ["proved", "failed", "stopped", "none"])
def test_fit_leaves_a_page_however_it_ends(wanted: str, base: str, tmp_path: Path, capsys) -> None:
    data, folder = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    options: dict[str, dict[str, object]] = {
        "proved": {"convergence__min_decrease": -9.0},
        "failed": {"convergence__min_decrease": 0.999},
        "stopped": {"memory__budget_mib": 1, "memory__on_exceeded": "stop"},
        "none": {"report": "false", "convergence__min_decrease": -9.0},
    }
    with pytest.raises(SystemExit) if wanted in ("failed", "stopped") else nullcontext():
        fit(base, data, folder, max_steps=4, **options[wanted])
    page = folder / FILE_NAME
    said = f"report          {page}" in capsys.readouterr().out
    if wanted in ("none", "stopped"):  # over its budget before the first step, there is no run to show
        assert not page.exists()
        assert not said
        return
    assert said
    assert {"proved": "proved", "failed": "not proved"}[wanted] in Page(page).text


@pytest.mark.report
@pytest.mark.filterwarnings("ignore:Nothing saved:UserWarning")
def test_a_run_that_an_error_ends_has_a_page_too(base: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SystemExit):
        fit(base, data, tmp_path / "run", max_steps=40, model__optimization__learning_rate=1e30)
    assert "is not finite" in Page(tmp_path / "run" / FILE_NAME).text


def test_it_shows_what_the_run_recorded(run: Path) -> None:
    page = Page(write_report(run))
    metrics = read_run(run).metrics
    verdict = json.loads((run / "verdict.json").read_text())
    circumstances = json.loads((run / "circumstances.json").read_text())
    expected = [
        verdict["result"],
        *(check["detail"] for check in verdict["verdicts"]),
        f"{metrics.losses[0]:.3f} → {metrics.losses[-1]:.3f}",
        f"{metrics.validation[-1]['val_loss']:.3f}",
        verdict["base"],
        circumstances["data"]["sha256"]["training data"],
        circumstances["starts"][0]["packages"]["torch"],
        (run / "config.yaml").read_text(),
        "<script>alert('one')</script>",
    ]
    for text in expected:
        assert text in page.text
    titles = ["Loss", "Gradient norm by layer", "Size of the update", "Size of A", "Memory by phase"]
    assert len(page.pictures) == len(titles) + 1  # and rate, norm and throughput
    assert not [name for name in read_run(run).missing if not name.startswith("evaluation")]


def test_it_needs_no_network_runs_nothing_and_takes_no_markup_from_data(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "<b>one" in page.text
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import", path.read_text())
    for picture in page.pictures:
        outside = set(re.findall(r"(?:href|src)=\"([^\"#]+)\"", picture)) - {""}
        assert all(address.startswith("data:image/png;base64,") for address in outside)


def test_answers_before_and_after_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    answers = {"expected": ["yes", "<i>no</i>"], "before": ["hm", "oh"], "after": ["yes", "no"]}
    (run / "evaluation.json").write_text(json.dumps(answers))
    text = Page(write_report(run)).text
    assert all(answer in text for column in answers.values() for answer in column)


def test_scores_before_and_after_stand_with_what_was_found(run: Path) -> None:
    side = {"value": 12.345, "low": 1.0, "high": 20.0}
    scores = {
        "exact match": {"before": side, "after": {**side, "value": 15.0}, "p": 0.01, "finding": "better, p = 0.01"}
    }
    for content in ({"scores": scores}, {"adapters": {"a": {"scores": scores}, "b": {"scores": scores}}}):
        (run / "evaluation.json").write_text(json.dumps(content))
        text = Page(write_report(run)).text
        assert "12.35 [1.00, 20.00]" in text or "12.34 [1.00, 20.00]" in text
        assert "better, p = 0.01" in text
        assert ("exact match (b)" in text) == ("adapters" in content)
        assert "evaluation.json" not in text


def test_what_a_run_forgot_is_among_its_numbers(run: Path) -> None:
    shift = {"step": 4, "base_loss": 3.5, "loss": 3.75, "kl": 0.0123}
    (run / "forgetting.json").write_text(json.dumps({"history": [{**shift, "kl": 0.0}, shift]}))
    text = Page(write_report(run)).text
    assert "loss on general text" in text
    assert "3.500 → 3.750" in text
    assert "0.0123" in text


def test_a_run_that_goes_on_is_shown_as_far_as_it_has_come(run: Path) -> None:
    for name in ("verdict.json", "convergence.json"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # and a line is being written
    page = Page(write_report(run))
    assert "no verdict" in page.text
    assert "adapter: not there" in page.text


DAMAGE: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda path: path.write_text("{]\n"),
    "config.yaml": lambda path: path.write_text("a: [\n"),
    "circumstances.json": lambda path: path.write_text('{"format": 1, "starts": [3]}'),
    "adapter": lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x00" * 40),
    "evaluation.json": lambda path: path.write_text('{"expected": [1], "before": [], "after": []}'),
    "forgetting.json": lambda path: path.write_text('{"history": [3]}'),
    "logs/version_0/metrics.csv": lambda path: path.write_bytes(b"step,grad_norm/layers.0\n\xff,\xfe\n"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(name: str, run: Path) -> None:
    DAMAGE[name](run / name)
    page = Page(write_report(run))
    assert f"{name}: " in page.text
    assert len(page.pictures) >= 3


def test_runs_side_by_side_show_what_differs(run: Path, base: str, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    fit(base, str(run.parent / "rows.jsonl") if (run.parent / "rows.jsonl").exists() else
        write_rows(tmp_path / "rows.jsonl", ROWS), other, max_steps=4, model__lora__r=4)  # fmt: skip
    lit_lora("report", run, other, "--output", tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    table = page.text[page.text.index("Settings that differ") : page.text.index("Training")]
    assert "model.lora.r" in table
    assert "trainer.max_steps" in table
    assert "data.batch_size" not in table
    assert f"report written to {tmp_path / 'both.html'}" in capsys.readouterr().out


def test_a_colour_means_the_same_in_all_runs_of_a_page() -> None:
    one, other = {"layers.0": {1: 1.0, 2: 2.0}}, {"layers.0": {1: 2.0, 2: 4.0}}
    norms = [1.0, 2.0, 2.0, 4.0]

    def ends(gradients: dict[str, dict[int, float]], all_norms: list[float]) -> list[object]:
        picture = base64.b64decode(gradient_chart(gradients, all_norms).partition(",")[2]).decode()
        content = base64.b64decode(re.sub(r"\s", "", re.search(r"data:image/png;base64,([^\"]+)", picture)[1]))
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [image.getpixel((x, image.height // 2)) for x in (2, image.width - 3)]

    assert ends(one, norms)[1] == ends(other, norms)[0]
    assert ends(one, []) == ends(other, [])
    assert ends(one, norms) != ends(one, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run: no such folder"),
        (["."], "it holds neither metrics.jsonl nor config.yaml"),
        (["run", "run/", "--output", "x.html"], "a run is named twice"),
        (["run", "."], "set --output to a file"),
        (["run", "--output", "run"], "run is a folder"),
        ([], "missing: runs"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit):
        lit_lora("report", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it(width: int, run: Path, tmp_path: Path) -> None:
    """What is on the picture of the page: lines in the first colour of the charts, and both ends of the heat maps."""
    page, picture = write_report(run), tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
    subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},5000",
         f"--screenshot={picture}", page.resolve().as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    colors = {color for _, color in Image.open(io.BytesIO(picture.read_bytes())).convert("RGB").getcolors(1 << 24)}
    for wanted in ((0, 114, 178), (68, 1, 84), (253, 231, 37)):
        assert min(max(abs(a - b) for a, b in zip(color, wanted, strict=True)) for color in colors) <= 6, wanted
