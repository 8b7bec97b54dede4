"""Memory by phase: real allocations land in their phase, budgets stop, leaks show."""

from __future__ import annotations

import gc
import mmap
import warnings

import pytest
import torch
from plain_projects import AdapterModel

from lit_lora.callbacks import MemoryBudgetExceeded, MemoryProfiler
from lit_lora.callbacks._support.memory_meters import MIB, CudaMeter, ResidentMeter
from lit_lora.callbacks.memory_profiler import _Growth

BIG_MIB = 256


@pytest.fixture(autouse=True)
def _nothing_to_collect():
    """What earlier tests left would be given back in the middle of a test, and hide what the test takes."""
    gc.collect()


def touch(mib: float) -> torch.Tensor:
    """Of the system's own: malloc may hold as much from tests before, and then nothing grows."""
    return torch.frombuffer(mmap.mmap(-1, int(mib * MIB)), dtype=torch.float32).fill_(1)


class Hungry(AdapterModel):
    """Takes a lot in one phase, and lets go of it within the phase."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.layers[0].lora_B.weight.register_hook(lambda grad: self.take("backward") or grad)

    def take(self, phase: str) -> None:
        if phase == self.phase and self.trainer.global_step == 3:
            touch(BIG_MIB)

    def training_step(self, batch, batch_idx):
        self.take("forward")
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args, **kwargs):
        self.take("optimizer")

    def validation_step(self, batch, batch_idx):
        if self.phase == "validation":
            touch(BIG_MIB)


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer", "validation"])
def test_what_a_phase_takes_is_counted_there_and_nowhere_else(make_trainer, logger, phase):
    callback = MemoryProfiler()
    trainer = make_trainer(callback, logger=logger, limit_val_batches=1, val_check_interval=4)
    trainer.fit(Hungry(phase))
    if "boundaries" in callback._meter.method:
        pytest.skip("this kernel does not forget peaks on request")
    highest = max(peak for name, peak in callback.peaks_mib.items() if name not in (phase, "load"))
    assert callback.peaks_mib[phase] > highest + 0.8 * BIG_MIB
    assert max(logger.values(f"memory/{phase}_peak_mib")) == pytest.approx(callback.peaks_mib[phase], abs=2)
    assert len(logger.values("memory/resident_mib")) == 8
    assert callback.verdict.passed is None
    assert not callback.verdict.asked


def test_what_malloc_holds_does_not_hide_that_the_kernel_forgets_peaks():
    fresh = ResidentMeter()
    fresh.reset_peak()
    if "boundaries" in fresh.method:
        pytest.skip("this kernel does not forget peaks on request")
    blocks = [bytearray(64 * 1024) for _ in range(3200)]  # from the heap, where freed ones stay: one lies on top
    blocks[:] = blocks[-1:]
    meter = ResidentMeter()
    meter.reset_peak()
    assert meter.method == fresh.method
    start = meter.current_mib()
    touch(BIG_MIB)
    assert meter.peak_mib() > start + 0.8 * BIG_MIB


def test_exceeded_budget_stops_in_its_phase(make_trainer):
    budget = ResidentMeter().current_mib() + BIG_MIB / 2
    callback = MemoryProfiler(budget_mib=budget, on_exceeded="stop")
    trainer = make_trainer(callback)
    with pytest.raises(MemoryBudgetExceeded, match=r"phase forward used \d+ MiB .*budget .*lower the batch size"):
        trainer.fit(Hungry("forward"))
    assert trainer.global_step == 3
    assert callback.verdict.passed is False


def test_exceeded_budget_warns_once_a_phase_and_fails_the_verdict(make_trainer):
    callback = MemoryProfiler(budget_mib=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback).fit(AdapterModel())
    messages = [str(w.message) for w in caught if str(w.message).startswith("phase ")]
    assert sorted(message.split()[1] for message in messages) == ["backward", "forward", "load", "optimizer", "other"]
    assert callback.verdict.passed is False
    assert callback.verdict.detail.count("budget 1 MiB:") == 1  # the worst phase in full
    assert "also over it: " in callback.verdict.detail


def test_budget_above_the_baseline(make_trainer, logger):
    callback = MemoryProfiler(budget_mib=BIG_MIB / 2, baseline=True)
    make_trainer(callback, logger=logger).fit(AdapterModel())
    assert callback.verdict.passed
    above = logger.values("memory/peak_above_baseline_mib")
    assert 0 <= above[-1] < BIG_MIB / 2
    with pytest.warns(UserWarning, match="MiB above the baseline"):
        make_trainer(MemoryProfiler(budget_mib=BIG_MIB / 2, baseline=True)).fit(Hungry("forward"))


def test_growth_is_measured_and_a_leak_fails(make_trainer, logger):
    class Leaky(AdapterModel):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[torch.Tensor] = []

        def training_step(self, batch, batch_idx):
            self.kept.append(touch(2))
            return super().training_step(batch, batch_idx)

    settings = {"max_growth_mib_per_1000_steps": 1000.0, "warmup_steps": 5, "on_exceeded": "stop"}
    callback = MemoryProfiler(**settings)
    with pytest.raises(MemoryBudgetExceeded, match="memory leaks"):
        make_trainer(callback, logger=logger, max_steps=50).fit(Leaky())
    assert callback.growth_mib_per_1000_steps == pytest.approx(2000, rel=0.15)
    assert logger.values("memory/growth_mib_per_1000_steps")
    steady = MemoryProfiler(**settings)
    make_trainer(steady, max_steps=50).fit(AdapterModel())
    assert steady.verdict.passed


def test_memory_that_an_allocator_takes_at_first_is_no_growth_and_a_leak_is():
    filling, leaking = _Growth(), _Growth()
    for step in range(200):
        filling.add(step, min(step, 90) * 5.0)
        leaking.add(step, min(step, 90) * 5.0 + step * 0.25)
    assert filling.slope == pytest.approx(0, abs=1e-9)
    assert leaking.slope == pytest.approx(0.25)


def test_growth_of_a_long_run_is_kept_in_little_memory():
    growth = _Growth()
    for step in range(20_000):
        growth.add(step, 0.5 * step)
    assert len(growth.later_half) < 2048
    assert growth.later_half[0][0] == pytest.approx(10_000, rel=0.05)
    assert growth.slope == pytest.approx(0.5)


def test_short_run_has_no_growth(make_trainer):
    callback = MemoryProfiler(max_growth_mib_per_1000_steps=1.0)
    make_trainer(callback).fit(AdapterModel())
    assert callback.verdict.passed is None
    assert callback.verdict.asked
    assert "too few steps" in callback.verdict.detail
    kept = MemoryProfiler(budget_mib=10**6, max_growth_mib_per_1000_steps=1.0)
    make_trainer(kept).fit(AdapterModel())
    assert kept.verdict.passed is None  # one of two was not judged


def test_peaks_outlive_a_resume():
    callback = MemoryProfiler()
    callback.peaks_mib = {"forward": 5.0}
    callback.load_state_dict({"peaks_mib": {"forward": 7.0, "load": 3.0}})
    assert callback.state_dict() == {"peaks_mib": {"forward": 7.0, "load": 3.0}, "baseline_mib": 0.0}


@pytest.mark.parametrize("on_exceeded", ["warn", "stop"])
def test_a_budget_that_was_exceeded_before_a_resume_stays_exceeded(make_trainer, tmp_path, on_exceeded):
    budget = ResidentMeter().current_mib() + BIG_MIB / 2
    trainer = make_trainer(MemoryProfiler(budget_mib=budget))
    with pytest.warns(UserWarning, match="phase forward used"):
        trainer.fit(Hungry("forward"))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = MemoryProfiler(budget_mib=budget, on_exceeded=on_exceeded)
    resumed = make_trainer(again, max_steps=10)
    settings = {"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}
    if on_exceeded == "stop":
        with pytest.raises(MemoryBudgetExceeded, match="phase forward used"):
            resumed.fit(AdapterModel(), **settings)
        assert resumed.global_step == 8
    else:
        resumed.fit(AdapterModel(), **settings)
    assert again.verdict.passed is False
    raised = MemoryProfiler(budget_mib=budget + 2 * BIG_MIB)
    make_trainer(raised, max_steps=10).fit(AdapterModel(), **settings)
    assert raised.verdict.passed


def test_meter_sees_a_peak_that_is_gone():
    meter = ResidentMeter()
    meter.reset_peak()
    if "boundaries" in meter.method:
        pytest.skip("this kernel does not forget peaks on request")
    before = meter.current_mib()
    touch(BIG_MIB)
    assert meter.current_mib() < before + BIG_MIB / 2
    assert meter.peak_mib() > before + 0.8 * BIG_MIB
    meter.reset_peak()
    assert meter.peak_mib() < before + BIG_MIB / 2


@pytest.mark.parametrize(
    "settings",
    [{"budget_mib": 0}, {"on_exceeded": "raise"}, {"on_exceeded": "stop"}, {"warmup_steps": -1}],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemoryProfiler(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_phases(make_trainer, logger):
    class HungryOnCuda(Hungry):
        def take(self, phase: str) -> None:
            if phase == self.phase and self.trainer.global_step == 3:
                torch.ones(BIG_MIB * MIB // 4, device=self.device)

    callback = MemoryProfiler()
    make_trainer(callback, accelerator="gpu", devices=1, logger=logger).fit(HungryOnCuda("backward"))
    assert callback.peaks_mib["backward"] > callback.peaks_mib["forward"] + 0.9 * BIG_MIB
    assert logger.values("memory/reserved_mib")[-1] >= BIG_MIB
    stop = MemoryProfiler(budget_mib=BIG_MIB / 2, on_exceeded="stop")
    with pytest.raises(MemoryBudgetExceeded, match="phase forward"):
        make_trainer(stop, accelerator="gpu", devices=1).fit(HungryOnCuda("forward"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_cuda_graphs_hold_is_counted_once():
    device = torch.device("cuda", torch.cuda.current_device())
    meter = CudaMeter(device)
    torch.ones(8, device=device) * 2
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = meter.current_mib()
    meter.reset_peak()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        torch.zeros(BIG_MIB * MIB // 4, device=device)
    assert BIG_MIB <= meter.peak_mib(recording=True) - before < 1.2 * BIG_MIB
    for _ in range(2):
        meter.reset_peak()
        graph.replay()
        assert BIG_MIB <= meter.peak_mib() - before < 1.2 * BIG_MIB
    del graph
    torch.cuda.empty_cache()
    assert meter.current_mib() - before < 0.1 * BIG_MIB
