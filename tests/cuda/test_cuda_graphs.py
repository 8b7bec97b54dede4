"""On a GPU: a step that is recorded gives what it gives launch by launch, up to rounding."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from lit_lora import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.base.quantize import quantize_
from lit_lora.build import make_trainable
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels import cuda_cards
from lit_lora.language_model import cuda_graphs
from lit_lora.language_model.cuda_graphs import CudaGraphs
from lit_lora.language_model.fixed_shape import FixedBatch, shape_for
from lit_lora.language_model.forward import language_model_loss
from tests.tiny import examples, language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # other versions of libraries
]
CUDA = torch.device("cuda")
LENGTHS = [(7, 30, 5, 64), (60, 80, 9), (3, 9, 5), (90, 100, 70), (7, 30, 5, 60), (66, 80, 9), (90, 101, 69), (4, 4)]


@pytest.fixture(autouse=True)
def _without_cudnn():
    cuda_cards.prepare_attention(CUDA)


def _batch(lengths, seed=0):
    made = [
        TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
        for i, (ids, mask) in enumerate(examples(lengths, seed))
    ]
    return {name: x.to(CUDA) if isinstance(x, torch.Tensor) else x for name, x in collate_packed(made).items()}


BATCHES = list(enumerate(LENGTHS))


def _built(dtype=torch.bfloat16, lora=None, quantized=False, kind="Llama", step=None, **fields):
    fields = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **fields,
    }
    model = language_model(kind, **fields).to(CUDA, dtype)
    if quantized:
        quantize_(model, QuantizationConfig(compute_dtype="bfloat16"))
    lora = lora or LoRAConfig(r=4, init_lora_weights=False)
    step = step or StepConfig()
    path = make_trainable(model, lora, step).path
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, path, parameters, CudaGraphs(model, step, path, parameters)


def _gradients(loss, parameters):
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def _are_near(found, expected):
    """Attention's backward pass adds up in any order, so that two plain steps differ, too."""
    assert [a is None for a in found] == [b is None for b in expected]
    mine, theirs = (torch.cat([x.flatten() for x in side if x is not None]) for side in (found, expected))
    return (mine - theirs).norm() <= 0.03 * theirs.norm()


CASES = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "NF4": {"quantized": True},
    "dropout": {"lora": LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False)},
    "Qwen2": {"kind": "Qwen2"},
    "sliding window": {"kind": "Mistral", "sliding_window": 16},
    "DoRA": {"lora": LoRAConfig(r=4, use_dora=True, init_lora_weights=False)},
    "recomputed": {"step": StepConfig(recompute=True)},
    "recomputed NF4": {"step": StepConfig(recompute=1), "quantized": True},
    "some layers": {"lora": LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_equal_plain_ones(case, autocast):
    model, path, parameters, graphs = _built(**CASES[case])
    dtype = next(p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16, torch.uint8))
    dtype = torch.bfloat16 if dtype == torch.uint8 else dtype
    for number, lengths in BATCHES:
        batch = _batch(lengths, number)
        with torch.no_grad():  # recorded steps see what an optimizer did
            for parameter in parameters:
                parameter.mul_(1.01)
        results = []
        for recorded in (False, True):
            torch.manual_seed(number)
            with torch.autocast("cuda", dtype=dtype) if autocast else nullcontext():
                if recorded:
                    loss = graphs.nll_sum(batch)
                else:
                    fixed = FixedBatch(shape_for(batch), CUDA).filled(batch)
                    loss = language_model_loss(model, fixed, path).nll_sum
            results.append((loss.detach(), _gradients(loss / 7, parameters)))
        (expected_loss, expected), (loss, found) = results
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert _are_near(found, expected), number
    assert not graphs.failed
    assert graphs._recorded.keys() == {shape_for(_batch(lengths, number)) for number, lengths in BATCHES[2:]}


def test_gradients_of_several_batches_add_up():
    model, path, parameters, graphs = _built()
    batches = [_batch(lengths, number) for number, lengths in BATCHES]
    for batch in batches:
        graphs.nll_sum(batch).backward()
    expected = None
    for way in (graphs.nll_sum, lambda batch: language_model_loss(model, batch, path).nll_sum):
        for parameter in parameters:
            parameter.grad = None
        for batch in batches:
            way(batch).backward()
        found = torch.cat([p.grad.flatten() for p in parameters])
        expected = found.clone() if expected is None else expected
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_loss_that_waits_for_its_backward_pass_is_not_written_over():
    _, _, parameters, graphs = _built()
    one, two = _batch(LENGTHS[0]), _batch(LENGTHS[4], 4)
    for _ in range(3):
        graphs.nll_sum(one).backward()
    alone = [_gradients(graphs.nll_sum(batch), parameters) for batch in (one, two)]
    together = _gradients(graphs.nll_sum(one) + graphs.nll_sum(two), parameters)
    for a, b, both in zip(*alone, together, strict=True):
        assert (both - a - b).norm() <= 0.03 * (a + b).norm()
    graphs.nll_sum(one)  # and one that nobody differentiates is forgotten
    assert _are_near(_gradients(graphs.nll_sum(two), parameters), alone[1])


def test_a_second_backward_pass_is_refused():
    *_, graphs = _built()
    for _ in range(2):
        graphs.nll_sum(_batch(LENGTHS[0])).backward()
    loss = graphs.nll_sum(_batch(LENGTHS[0]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_parameters_that_move_end_it():
    model, path, parameters, graphs = _built()
    batch = _batch(LENGTHS[0])
    for _ in range(3):
        graphs.nll_sum(batch).backward()
    with torch.no_grad():
        parameters[0].data = parameters[0].data.clone()
    expected = language_model_loss(model, FixedBatch(shape_for(batch), CUDA).filled(batch), path).nll_sum
    torch.testing.assert_close(graphs.nll_sum(batch), expected, rtol=1e-5, atol=0)
    assert "moved" in graphs.failed


@pytest.mark.parametrize("recompute", [False, True])
def test_what_cannot_be_recorded_trains_without(recompute):
    model, path, parameters, graphs = _built(dtype=torch.float32, step=StepConfig(recompute=recompute))
    for number, lengths in BATCHES:
        batch = _batch(lengths, number)
        expected = language_model_loss(model, batch, path).nll_sum
        found = graphs.nll_sum(batch)
        assert torch.equal(found, expected)
        assert _are_near(_gradients(found, parameters), _gradients(expected, parameters))
    assert "one by one" in graphs.failed


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_in_recomputed_layers_ends_it(recompute):
    lora = LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False)
    *_, graphs = _built(lora=lora, step=StepConfig(recompute=recompute))
    for number, lengths in BATCHES:
        graphs.nll_sum(_batch(lengths, number)).backward()
    assert ("dropout" in graphs.failed) is recompute
    assert bool(graphs._recorded) is not recompute


def test_what_draws_on_the_host_ends_it():
    model, *_, graphs = _built()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: torch.rand(()) and None)
    for number, lengths in BATCHES:
        graphs.nll_sum(_batch(lengths, number)).backward()
    assert "on the CPU" in graphs.failed


def test_long_recomputed_batches_are_computed_without(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECOMPUTED_TOKENS", 8)
    model, path, _, graphs = _built(step=StepConfig(recompute=True))
    for lengths in (LENGTHS[0], (4, 4), (4, 4), (4, 4), LENGTHS[0]):
        batch = _batch(lengths)
        found, expected = graphs.nll_sum(batch), language_model_loss(model, batch, path).nll_sum
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert graphs._recorded.keys() == {shape_for(_batch((4, 4)))}


def test_a_question_to_the_device_ends_it_and_nothing_else():
    model, path, parameters, graphs = _built()
    model.get_decoder().layers[0].mlp.register_forward_hook(
        lambda _module, _inputs, output: output.sum().item() and None
    )
    for number, lengths in BATCHES[:6]:
        batch = _batch(lengths, number)
        found = _gradients(graphs.nll_sum(batch), parameters)
        expected = _gradients(language_model_loss(model, batch, path).nll_sum, parameters)
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).norm() <= 0.05 * other.norm()
    assert graphs.failed
    assert torch.rand(8, device=CUDA).unique().numel() > 1  # random numbers are drawn as before


def test_no_more_graphs_than_there_may_be(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    model, path, _parameters, graphs = _built()
    for number, lengths in BATCHES:
        batch = _batch(lengths, number)
        fixed = FixedBatch(shape_for(batch), CUDA).filled(batch)
        expected = language_model_loss(model, fixed, path).nll_sum
        torch.testing.assert_close(graphs.nll_sum(batch).detach(), expected.detach(), rtol=1e-5, atol=0)
    assert len(graphs._recorded) == 1
    assert not graphs.failed
