"""The estimate of a step whose base lies in the memory of the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import Namespace

from lit_lora import LoRAConfig, QuantizationConfig, StepConfig, estimate_memory
from lit_lora.memory.storage_tracker import GATHERED
from lit_lora.memory.suggest import suggest
from lit_lora.tools.estimate import processes
from lit_lora.training.sharded_strategy import NAME, OFFLOADED
from tests.tiny import config

NUM_LAYERS = 6
WHOLE: dict[str, Any] = {"device": "cuda", "lengths": [40, 25], "lora": LoRAConfig(r=4)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.json"
    config("Llama", hidden_size=128, num_hidden_layers=NUM_LAYERS, vocab_size=260).to_json_file(path)
    return f"random:{path}"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
def test_the_device_has_what_is_gathered_and_the_host_the_shares(base, devices, quantization):
    options = {**WHOLE, "quantization": quantization, "devices": devices}
    kept, offloaded = (estimate_memory(base, cpu_offload=offload, **options) for offload in (False, True))
    on_device = kept.phases["optimizer"].by_category["base"]
    remains = offloaded.phases["optimizer"].by_category.get("base", 0)
    assert remains <= 1200 * 7 * NUM_LAYERS  # tables of codes, scales of scales
    assert on_device - remains <= offloaded.host_bytes <= 2 * (on_device - remains)
    backward = offloaded.phases["backward"]
    assert 0 < backward.by_category[GATHERED] < on_device * devices
    assert backward.total < kept.phases["backward"].total
    assert f"host: {offloaded.host_bytes / 1e6:,.1f} MB of the base" in str(offloaded)
    assert "host" not in str(kept)
    if devices == 2:  # the rest is as it is without
        without = kept.phases["optimizer"].total - on_device
        assert offloaded.phases["optimizer"].total - remains == without


def test_on_a_cpu_there_is_nothing_to_offload_to(base):
    with pytest.raises(ValueError, match="it is there anyway: estimate it with device cuda"):
        estimate_memory(base, cpu_offload=True, **{**WHOLE, "device": "cpu"})


@pytest.mark.parametrize(("device", "offers"), [("cuda", True), ("cpu", False)])
def test_what_to_do_where_a_model_does_not_fit_names_it_on_cuda(base, device, offers):
    estimate = estimate_memory(base, **{**WHOLE, "device": device}, step=StepConfig(recompute=True))
    changes = {suggestion.change: suggestion.estimate for suggestion in suggest(estimate)}
    assert (f"trainer.strategy {OFFLOADED}" in changes) == offers
    if offers:
        assert changes[f"trainer.strategy {OFFLOADED}"].host_bytes > 0


BY_CLASS = "lit_lora.training.sharded_strategy.LoRAShardedStrategy"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", (1, False, False)),
        ("ddp", (1, False, False)),
        (NAME, (2, True, False)),
        (OFFLOADED, (2, True, True)),
        (Namespace(class_path=BY_CLASS), (2, True, False)),
        (Namespace(class_path=BY_CLASS, init_args=Namespace(cpu_offload=True)), (2, True, True)),
        (Namespace(class_path="lightning.pytorch.strategies.DDPStrategy"), (1, False, False)),
    ],
)
def test_a_strategy_is_known_by_its_name_and_by_its_class(strategy, expected):
    trainer = SimpleNamespace(strategy=strategy, devices=2, num_nodes=1)
    assert processes(SimpleNamespace(trainer=trainer), None) == expected
