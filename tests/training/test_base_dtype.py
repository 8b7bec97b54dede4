"""``dtype: auto``: bfloat16 where the processor multiplies it, by its features, and kept by a run that goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from lit_lora import LoRALightningModule, QuantizationConfig
from lit_lora.base.load import load_base_model
from lit_lora.files.checkpoint import newest_checkpoint, read_checkpoint
from lit_lora.interchange.adapter_folder import folder_record
from lit_lora.kernels import cpu_features
from lit_lora.training import base_dtype
from lit_lora.training.metrics_record import TrainingMetrics
from tests.started_runs import fit, lit_lora, make_base, questions
from tests.training.resume_project import run
from tests.training.test_exact_resume import assert_same_end, project  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:The '.*_dataloader' does not have many workers",
)

CPU = torch.device("cpu")
QLORA = QuantizationConfig(block_size=32)


@pytest.fixture
def processor(monkeypatch):
    """Be another processor."""

    def be(*, has_bfloat16: bool) -> None:
        monkeypatch.setattr("lit_lora.base.load.multiplies_bfloat16", lambda: has_bfloat16)

    return be


@pytest.mark.parametrize(
    ("features", "amd", "limit", "expected"),
    [
        (["avx2"], True, None, False),
        (["avx512_f", "avx512_vnni"], True, None, False),
        (["avx512_f", "avx512_bf16"], True, None, True),
        (["avx512_f", "avx512_bf16"], False, None, False),
        (["avx512_bf16", "amx_bf16"], False, "", True),
        (["avx512_bf16"], True, "AVX512_CORE", False),
        (["avx512_bf16"], True, "avx512_core_vnni", False),
        (["avx512_bf16"], True, "avx512_core_bf16", True),
        (["avx512_bf16"], True, "ALL", True),
        (["amx_bf16"], False, "AVX512_CORE_AMX", True),
        (["amx_bf16"], False, "AVX2", False),
        (["avx2"], True, "AVX512_CORE_AMX", False),
    ],
)
def test_features_choose(monkeypatch, features, amd, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)
    monkeypatch.setattr(cpu_features, "by_amd", lambda: amd)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_features.multiplies_bfloat16.__wrapped__() is expected


def test_an_older_torch_that_cannot_tell_takes_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_features.multiplies_bfloat16.__wrapped__() is False


@pytest.mark.parametrize("has_bfloat16", [False, True])
@pytest.mark.parametrize("quantization", [False, True])
def test_a_base_alone_is_held_so_and_adapters_are_not(project, processor, has_bfloat16, quantization):  # noqa: F811
    processor(has_bfloat16=has_bfloat16)
    expected = torch.bfloat16 if has_bfloat16 else torch.float32
    assert load_base_model(project["base"]).dtype == expected
    assert load_base_model(project["base"], dtype="float32").dtype == torch.float32
    module = LoRALightningModule(project["base"], **({"quantization": QLORA} if quantization else {}))
    module.configure_model()
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert next(p.dtype for n, p in module.named_parameters() if "norm" in n) == expected


def train(folder: Path, max_steps: int, **options: object) -> None:
    """A run in a folder, of a base that lies beside it."""
    base = folder.parent / "base"
    if not base.exists():
        make_base(base)
    data = questions(folder.parent / "data.jsonl")
    options.setdefault("data__tokenizer", base)
    settings = {"model__optimization__lr_schedule": "constant", "model__lora__lora_dropout": 0.1, "data__batch_size": 2}
    fit(str(base), data, folder, max_steps=max_steps, convergence__min_decrease=-1, **settings, **options)


def losses(run: Path) -> list[float]:
    return [step.loss for step in TrainingMetrics.load(run / "metrics.jsonl").steps]


def began_in(run: Path) -> str:
    return read_checkpoint(newest_checkpoint(run / "checkpoints")[0])["lit_lora"]["base_dtype"]


BITS = {"model__quantization__bits": 4, "model__quantization__block_size": 32}
EMBEDDING_BITS = {**BITS, "model__quantization__embedding_bits": 8}
HELD: dict[str, dict[str, object]] = {
    "plain": {},
    "4 bits": BITS,
    "4 bits, 8 of the embedding": EMBEDDING_BITS,
    "8 bits": {"model__quantization__bits": 8},
    "trained embedding": {**BITS, "model__lora__modules_to_save": "[embed_tokens]"},
    "trained rows": {"model__lora__trainable_token_indices": "[97, 101]"},
    "drawn": EMBEDDING_BITS,
}


@pytest.mark.parametrize("began", ["bfloat16", "float32"])
@pytest.mark.parametrize("held", HELD)
def test_a_run_keeps_its_own_on_another_processor(processor, tmp_path, caplog, held, began):
    """From the command line, to the last bit; what it is held in is said first, and what would change it."""
    here, there = {"has_bfloat16": began == "bfloat16"}, {"has_bfloat16": began != "bfloat16"}
    options = HELD[held] | ({"model__base": f"random:{tmp_path / 'base'}"} if held == "drawn" else {})
    processor(**here)
    train(tmp_path / "whole", 5, **options)
    assert ("is held and multiplied in bfloat16" in caplog.text) is (began == "bfloat16")
    train(tmp_path / "run", 3, **options)
    caplog.clear()
    processor(**there)
    train(tmp_path / "run", 5, ckpt_path="last", **options)
    other = "float32" if began == "bfloat16" else "bfloat16"
    assert f"the base is in {began}, as the run began; --model.dtype {other} changes it" in caplog.text
    lit_lora("verify", tmp_path / "run")  # exits where it differs
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert began_in(tmp_path / "run") == began
    assert folder_record(str(tmp_path / "run" / "adapter")).dtype == began


def test_another_one_is_taken_where_it_is_set(processor, tmp_path, capsys):
    processor(has_bfloat16=True)
    train(tmp_path / "run", 2)
    with pytest.warns(UserWarning, match="the base was loaded in another dtype when the run began"):
        train(tmp_path / "run", 3, ckpt_path="last", model__dtype="float32")
    assert "dtype of the base was bfloat16, is float32" in capsys.readouterr().out
    assert began_in(tmp_path / "run") == "float32"


def test_a_trainer_that_says_too_late_what_it_goes_on_from_refuses(project, processor, tmp_path):  # noqa: F811
    """Lightning's own ``Trainer.fit(ckpt_path=...)``, where the base is loaded already."""
    processor(has_bfloat16=True)
    stopped = run(folder=str(tmp_path / "run"), stop_after=3, **project)
    processor(has_bfloat16=False)
    with pytest.raises(ValueError, match=r"began with a base in bfloat16, .*: set dtype='bfloat16'"):
        run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], **project)
    module = LoRALightningModule.load_from_checkpoint(stopped["ckpt_path"])
    module.configure_model()
    assert module.dtype_name == "bfloat16"


def test_exact_resume_in_bfloat16(project, tmp_path):  # noqa: F811
    settings = {**project, "dropout": 0.2, "accumulate": 3, "module_options": {"dtype": "bfloat16"}}
    whole = run(folder=str(tmp_path / "whole"), **settings)
    for stop_after, signum in ((4, signal.SIGTERM), (7, signal.SIGINT)):
        folder = str(tmp_path / f"stopped{stop_after}")
        stopped = run(folder=folder, stop_after=stop_after, signum=signum, **settings)
        assert_same_end(whole, run(folder=folder, ckpt_path=stopped["ckpt_path"], seed=99, **settings))


def _agree(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    base_dtype.resolve_dtype = lambda *_: torch.bfloat16 if rank else torch.float32  # type: ignore[attr-defined]
    taken = base_dtype.base_dtype("auto", CPU, SimpleNamespace(ckpt_path=None))
    torch.save(taken, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_processes_on_different_processors_agree(tmp_path):
    mp.spawn(_agree, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == ["float32"] * 2
