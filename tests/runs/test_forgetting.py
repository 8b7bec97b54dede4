"""What a run changes on general text: measured as by hand, on every path, and part of its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lit_lora import Forgetting, LoRALightningModule, SFTDataModule, load
from lit_lora import fit as fit_from_python
from lit_lora.adapters.merge import disable_lora
from lit_lora.callbacks import ConvergenceAssertion
from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.evaluation.drift import sample_logits
from lit_lora.metrics import TrainingMetrics
from tests.started_runs import fit, lit_lora, make_base, questions, write_rows

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

TEXTS = [
    {"text": text} for text in ("The quick brown fox.", "Water boils at 100 degrees, at sea level.", "Sea shells.")
]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "weight": 0.5}]},
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    make_base(folder / "base")
    questions(folder / "questions.jsonl")
    write_rows(folder / "general.jsonl", TEXTS)
    write_rows(folder / "chat.jsonl", CHAT)
    return folder


def train(place: Path, name: str, *, max_steps: int = 3, sample: str = "general.jsonl", **options: object) -> Path:
    data = str(place / "questions.jsonl")
    given = {"forgetting__data": place / sample, **options} if sample else options
    fit(str(place / "base"), data, place / name, max_steps=max_steps, **given)
    return place / name


def written(run: Path) -> dict[str, Any]:
    return json.loads((run / "forgetting.json").read_text())


def verdict(run: Path) -> dict[str, Any]:
    return json.loads((run / "verdict.json").read_text())


def by_hand(adapter: Path, sample: Path) -> tuple[float, float, float]:
    """Loss without and with the adapter, and divergence: of the model's own logits, one example after the other."""
    model, tokenizer, _ = load(str(adapter))
    examples = read_examples(str(sample), SourceSettings())
    encoded = encode_examples(tokenizer, examples.items, examples.problems, max_length=1024)
    with disable_lora(model):
        base = sample_logits(model, [example.ids for example in encoded])
    own = sample_logits(model, [example.ids for example in encoded])
    sums = torch.zeros(4, dtype=torch.float64)
    for example, before, after in zip(encoded, base, own, strict=True):
        places = [place for place, learned in enumerate(example.mask) if learned]
        ids = torch.tensor(example.ids)[places]
        weights = torch.tensor(example.weights or [1.0] * len(example.ids), dtype=torch.float64)[places]
        log_p, log_q = (F.log_softmax(x.double()[[p - 1 for p in places]], -1) for x in (before, after))
        nll = [-log.gather(1, ids[:, None]).squeeze(1) for log in (log_p, log_q)]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        sums += torch.stack([*nll, kl, torch.ones_like(kl)]) @ weights
    return tuple((sums[:3] / sums[3]).tolist())  # type: ignore[return-value]


WAYS: dict[str, dict[str, object]] = {
    "packed, of conversations with weights": {"sample": "chat.jsonl"},
    "padded": {"data__packing": "false"},
    "by the model's own logits": {"model__step__chunked_loss": "false"},
    "4 bits, in small batches": {"model__quantization__bits": 4, "data__batch_size": 1},
    "8 bits, embeddings too": {"model__quantization__bits": 8, "model__quantization__embedding_bits": 8},
    "dora": {"model__lora__use_dora": "true"},
    "the head trained": {"model__lora__modules_to_save": '["lm_head"]'},
    "rows of the embedding, dropout": {
        "model__lora__trainable_token_indices": "[115]",
        "model__lora__lora_dropout": 0.3,
    },
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_it_is_what_the_models_own_logits_say(place, tmp_path, options):
    run = train(place, f"ways-{tmp_path.name}", **options)
    first, last = (written(run)["history"][number] for number in (0, -1))
    assert (first["step"], last["step"]) == (0, 3)
    assert first["kl"] == pytest.approx(0, abs=1e-7)
    assert first["loss"] == pytest.approx(first["base_loss"], rel=1e-6)
    base_loss, loss, kl = by_hand(run / "adapter", place / str(options.get("sample", "general.jsonl")))
    assert last["base_loss"] == pytest.approx(base_loss, rel=1e-5)
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert last["kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-3


def test_a_run_trains_as_without_it_bit_for_bit(place):
    options: dict[str, object] = {"max_steps": 5, "model__lora__lora_dropout": 0.2, "trainer__val_check_interval": 2,
                                  "trainer__check_val_every_n_epoch": "null"}  # fmt: skip
    runs = [train(place, f"same{n}", sample=sample, **options) for n, sample in enumerate(["general.jsonl", ""])]
    with_it, without = (TrainingMetrics.load(run / "metrics.jsonl") for run in runs)
    assert [(s.loss, s.grad_norm, s.param_norm) for s in with_it.steps] == [
        (s.loss, s.grad_norm, s.param_norm) for s in without.steps
    ]
    assert with_it.validation == without.validation
    assert [entry["step"] for entry in written(runs[0])["history"]] == [0, 2, 4, 5]
    assert "forgetting" not in [check["name"] for check in verdict(runs[1])["verdicts"]]
    logged = (runs[0] / "logs" / "version_0" / "metrics.csv").read_text()
    assert "forgetting/kl,forgetting/loss" in logged.splitlines()[0]


BOUNDS: dict[str, tuple[dict[str, object], bool | None, str]] = {
    "none": ({}, None, "no bound set"),
    "kept": ({"forgetting__max_kl": 9, "forgetting__max_loss_rise": 9}, True, "allowed KL 9 and a rise of 9"),
    "divergence": ({"forgetting__max_kl": 1e-6}, False, "allowed KL 1e-06; lower the learning rate"),
    "loss": ({"forgetting__max_loss_rise": 0.01, "sample": "odd.jsonl"}, False, "allowed a rise of 0.01; lower"),
}


@pytest.mark.parametrize(("options", "passed", "detail"), BOUNDS.values(), ids=BOUNDS)
def test_a_bound_that_is_exceeded_fails_the_run(place, tmp_path, capsys, options, passed, detail):
    odd = {"say one": "zqxj~#zqxj~#", "say four": "~~##~~##"}  # whose other answers are learned
    write_rows(place / "odd.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in odd.items()])
    name = f"bounds-{tmp_path.name}"
    if passed is False:
        with pytest.warns(UserWarning, match="forgetting: KL"), pytest.raises(SystemExit) as ended:
            train(place, name, max_steps=12, **options)
        assert ended.value.code == 3
    else:
        train(place, name, max_steps=12, **options)
    (check,) = [check for check in verdict(place / name)["verdicts"] if check["name"] == "forgetting"]
    assert check["passed"] is passed
    assert detail in check["detail"]
    assert verdict(place / name)["result"] == ("not proved" if passed is False else "proved")
    assert f"forgetting      {'FAILED: ' if passed is False else ''}KL to the base" in capsys.readouterr().out
    assert {key: written(place / name)[key] for key in check} == check


def test_a_resumed_run_goes_on_with_its_measurements(place, capsys):
    whole = train(place, "whole", max_steps=6, model__optimization__lr_schedule="constant")
    part = train(place, "part", max_steps=3, model__optimization__lr_schedule="constant")
    options: dict[str, object] = {"ckpt_path": "last", "model__optimization__lr_schedule": "constant"}
    train(place, "part", max_steps=6, **options)
    both = [written(run)["history"] for run in (whole, part)]
    assert [entry["step"] for entry in both[1]] == [0, 3, 6]
    assert both[1][-1] == both[0][-1]
    before = (part / "verdict.json").read_text(), (part / "forgetting.json").read_text()
    capsys.readouterr()
    train(place, "part", max_steps=6, **options)
    assert "forgetting      KL to the base" in capsys.readouterr().out
    assert (part / "verdict.json").read_text() == before[0]


def test_a_changed_sample_is_found_by_verify(place, capsys):
    run = train(place, "verified", sample="sample.jsonl" if (place / "sample.jsonl").exists() else _sample(place))
    lit_lora("verify", run)
    assert "repeated bit for bit" in capsys.readouterr().out
    write_rows(place / "sample.jsonl", [*TEXTS[:2], {"text": "Something else."}])
    with pytest.raises(SystemExit):
        lit_lora("verify", run)
    assert "the forgetting data are not those of the run" in capsys.readouterr().out


def _sample(place: Path) -> str:
    write_rows(place / "sample.jsonl", TEXTS)
    return "sample.jsonl"


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no such file": ({"forgetting__data": "nowhere.jsonl"}, "forgetting.data: "),
    "a bound without a sample": ({"forgetting__max_kl": 1}, "max_kl has no effect without a sample"),
    "a bound below zero": (
        {"forgetting__data": "x", "forgetting__max_loss_rise": -1},
        "max_loss_rise must be a finite",
    ),
    "no rows": ({"forgetting__data": "x", "forgetting__limit": 0}, "limit must be at least 1 row"),
    "weights": ({"forgetting__data": '[{"path": "{place}/general.jsonl", "weight": 0.5}]'}, "weight"),
    "pairs": ({"forgetting__data": "{place}/pairs.jsonl"}, "chosen"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_run(place, tmp_path, capsys, options, message):
    write_rows(place / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    given = {k: v.replace("{place}", str(place)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(SystemExit):
        fit(str(place / "base"), str(place / "questions.jsonl"), tmp_path / "run", max_steps=1, **given)
    said = capsys.readouterr()
    assert message in said.err
    assert "base:" not in said.err + said.out


class OwnLoss(LoRALightningModule):
    def compute_loss(self, batch, *, accuracy=False):
        return super().compute_loss(batch, accuracy=accuracy)


def test_a_module_with_another_loss_is_refused_by_name(place, tmp_path):
    data = SFTDataModule(str(place / "questions.jsonl"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data compares .*; this is OwnLoss on SFTDataModule: leave it out"):
        fit_from_python(
            OwnLoss(str(place / "base")),
            data,
            tmp_path / "run",
            callbacks=[Forgetting(str(place / "general.jsonl"))],
            max_steps=1,
            accelerator="cpu",
            report=False,
        )


def test_from_python_the_sample_may_be_in_memory(place, tmp_path):
    data = SFTDataModule(str(place / "questions.jsonl"), cache_dir=tmp_path / "cache")
    forgetting = Forgetting(TEXTS, max_kl=9.0)
    outcome = fit_from_python(
        LoRALightningModule(str(place / "base")),
        data,
        tmp_path / "run",
        callbacks=[forgetting, ConvergenceAssertion(0.0)],
        max_steps=2,
        accelerator="cpu",
        report=False,
        quiet=True,
    )
    assert outcome is not None
    assert {check.name: check.passed for check in outcome.verdicts}["forgetting"] is True
    assert [shift.step for shift in forgetting.history] == [0, 2]
    assert forgetting.data == ["the list in memory"]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("strategy", "options"),
    [("ddp", {}), ("lora_sharded", {"model__quantization__bits": 4})],
    ids=["ddp", "lora_sharded"],
)
def test_processes_measure_their_shares(place, strategy, options):
    two = {"trainer__accumulate_grad_batches": 2, "data__batch_size": 2}
    alone = train(place, f"alone-{strategy}", **two, **options)
    command = [sys.executable, "-m", "lit_lora", "fit", "--config", alone / "config.yaml", "--trainer.devices=2"]
    more = [f"--trainer.strategy={strategy}", "--trainer.accumulate_grad_batches=1", "--report=false"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = place / f"two-{strategy}"
    arguments = [*map(str, command), *more, f"--trainer.default_root_dir={run}"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(written(alone)["history"], written(run)["history"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-7)
