"""Every causal architecture of transformers is built as ``fit`` builds it, in the types that a CPU computes in.

Its loss is that of its own forward pass in float32. How exact the gradients are is for ``tests/sweep``, in float32;
here it is enough that a part of some model which takes more than others, or has less, does not stop the run.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_lora.build import make_trainable
from lit_lora.config import StepConfig
from lit_lora.data.batches.packing import collate_packed
from lit_lora.language_model.forward import language_model_loss
from tests.language_model.test_forward import _collated, _reference_loss
from tests.started_runs import fit, questions
from tests.sweep.compare import _adaptable, build
from tests.sweep.configs import tiny_config
from tests.tiny import examples

pytestmark = pytest.mark.filterwarnings("ignore")  # of what is not adapted, and transformers' own

REFUSED = {
    "cpmant": "not causal",
    "prophetnet": "not causal",
    "reformer": "does not run in training mode",
    "xlnet": "not causal",
}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_it_trains(model_type: str, dtype: torch.dtype) -> None:
    try:
        own = build(model_type).eval()
        model = copy.deepcopy(own).to(dtype)
        with torch.no_grad():
            expected, _ = (float(_reference_loss(each, examples())) for each in (own, model))
        lora = replace(_adaptable(own), init_lora_weights=True)
    except Exception as error:
        pytest.skip(f"transformers does not run a tiny one on text: {type(error).__name__}")
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            make_trainable(model, lora, StepConfig())
        return
    path = make_trainable(model, lora, StepConfig()).path
    assert path is not None
    loss = language_model_loss(model.eval(), _collated(collate_packed, examples()), path).nll_sum
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=LOSS_TOLERANCE[dtype])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [
        ("qwen3_next", ".*mlp.*"),  # a norm with a gate
        ("mamba2", "[out_proj]"),
        ("gptj", "null"),  # positions by a function of three arguments
        ("mpt", "null"),  # a norm without bias
        ("modernbert-decoder", "null"),  # a decoder that takes no token ids
    ],
)
def test_fit_takes_a_step_of_it_in_half_precision(model_type: str, left_out: str, tmp_path: Path) -> None:
    fields = tiny_config(model_type, vocab_size=260).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = {"model__dtype": "bfloat16", "model__lora__exclude_modules": left_out, "data__tokenizer": "bytes"}
    data, run = questions(tmp_path / "data.jsonl"), tmp_path / "run"
    adapter = fit(f"random:{tmp_path / 'config.json'}", data, run, max_steps=1, convergence__min_decrease=-1, **options)
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fit_refuses_one_that_sees_later_tokens(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sent twice, too."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bert", vocab_size=260, is_decoder=False).to_dict()))
    data, run = questions(tmp_path / "data.jsonl"), tmp_path / "run"
    options = {"model__dtype": dtype, "data__tokenizer": "bytes"}
    for _ in range(2):
        with pytest.raises(SystemExit):
            fit(f"random:{tmp_path / 'config.json'}", data, run, max_steps=1, **options)
        assert "BertLMHeadModel is not causal" in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("adapter_model.safetensors")]
