"""What a training step does not do: work below the lowest adapter, and questions to the device."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lora import LoRAConfig, inject_lora
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.trial import choose_path
from tests.tiny import examples, language_model


class Operations(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _step(**lora):
    """Operators of a forward and of a backward pass."""
    model = language_model(num_hidden_layers=4)
    inject_lora(model, LoRAConfig(r=4, **lora))
    model.train()
    path = choose_path(model, shared_prefix=False)  # as on CUDA: on a CPU a value costs nothing to read
    made = [
        TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
        for i, (ids, mask) in enumerate(examples())
    ]
    batch = collate_packed(made)
    with Operations() as forward:
        loss = language_model_loss(model, batch, path).nll_sum
    with Operations() as backward:
        loss.backward()
    return forward.counts, backward.counts


def test_no_work_below_the_lowest_adapter():
    _, everywhere = _step()
    _, last = _step(layers_to_transform=[3])
    products = sum(everywhere[name] for name in ("mm", "addmm", "addmm_"))
    assert products > 0
    assert sum(last[name] for name in ("mm", "addmm", "addmm_")) <= products / 4 + 2


@pytest.mark.parametrize("half", [0, 1], ids=["forward", "backward"])
def test_a_step_reads_no_value_from_the_device(half):
    counts = _step()[half]
    assert not {"_local_scalar_dense", "nonzero", "masked_select"} & counts.keys()
    assert len(counts) > 5
