"""The CUDA suite on a CPU: what runs there runs, what needs CUDA says so, and nothing is left out in silence."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cuda import correctness
from benchmarks.cuda import plan as cuda_plan
from benchmarks.cuda import suite as cuda_suite
from benchmarks.cuda import worker as cuda_worker
from benchmarks.cuda.data import TINY, base_of, config_of, natural
from benchmarks.cuda.memory import GRANULARITY, _step_fits, confirm, longest_fitting
from benchmarks.cuda.speed import step_flops
from benchmarks.cuda.worker import Measurement, Outcome, Row, Worker
from benchmarks.peers.step_clock import StepClock, tally
from lit_lora.adapters import functional, half_precision

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class InProcess:
    """Measures here: a process takes longer to start than these measurements."""

    lock = threading.Lock()  # the estimate, made beside the rest, selects attention for the whole process

    def __init__(self, folder: Path, number: int, **_: Any) -> None: ...

    def wait_ready(self, limit_s: float) -> None: ...

    def run(self, measurement: Measurement, limit_s: float) -> Outcome:
        with self.lock:
            return cuda_worker.perform(measurement.measure, measurement.settings)

    def stop(self) -> None: ...


def run(output: Path, *arguments: str) -> int:
    command = ["--device", "cpu", "--models", TINY, "--output", str(output), "--steps", "1", "--rounds", "1"]
    command += ["--batch-size", "2", "--context-gb", "0.02", "--frameworks", "lit_lora", "liger", "peft"]
    start: Any = InProcess
    return cuda_suite.main([*command, *arguments], start=start)


def table(output: Path, part: str) -> list[dict[str, str]]:
    with (output / f"cuda_{part}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses(output: Path, part: str) -> dict[str, str]:
    return {row["name"]: row["status"] for row in table(output, part)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    output = tmp_path_factory.mktemp("results")
    return output, run(output)


def test_checks_that_need_no_gpu_pass_on_a_cpu_and_the_others_say_so(whole: tuple[Path, int]) -> None:
    output, code = whole
    assert code == 0
    assert statuses(output, "correctness") == {
        "gradients, float32": "passed",
        "gradients, bfloat16": "passed",
        "NF4 decode": "passed",
        "packed equals unpacked": "passed",
        "memory estimate": "needs CUDA",
        "tests marked gpu": "needs CUDA",
    }


def test_memory_rows_have_run_real_steps_and_stand_beside_their_estimates(whole: tuple[Path, int]) -> None:
    peaks = [row for row in table(whole[0], "memory") if row["name"] == "peak of a step"]
    assert [row["method"] for row in peaks] == ["LoRA, bf16", "QLoRA, NF4-DQ"]
    for row in peaks:
        assert (row["status"], row["num_steps"]) == ("needs CUDA", "3")
        assert float(row["estimated_reserved_mb"]) >= float(row["estimated_allocated_mb"]) > 0
    (context,) = [row for row in table(whole[0], "memory") if row["name"] == "longest context"]
    assert int(context["estimated_tokens"]) > 0


def test_speed_is_compared_after_parity(whole: tuple[Path, int]) -> None:
    rows = table(whole[0], "speed")
    found = {(row["name"], row["workload"], row["base"]): row for row in rows}
    assert found["parity with PEFT", "", ""]["status"] == "passed"
    assert found["liger", "natural", "16 or 32 bits"]["status"] == "needs CUDA"
    ours, theirs = (found[name, "natural", "16 or 32 bits"] for name in ("lit_lora", "peft"))
    assert float(ours["ratio"]) == pytest.approx(float(ours["tokens_per_s"]) / float(theirs["tokens_per_s"]), rel=1e-4)
    assert ours["num_tokens"] == theirs["num_tokens"]
    assert float(ours["mean_loss"]) == pytest.approx(float(theirs["mean_loss"]), abs=1e-3)
    quantized = found["lit_lora", "dense", "NF4"]
    assert float(quantized["ratio_to_lora"]) > 0
    assert 0 < float(quantized["share"]) < 1.5


def test_markdown_says_command_versions_and_that_a_cpu_is_no_gpu(whole: tuple[Path, int]) -> None:
    for part in cuda_suite.PARTS:
        text = (whole[0] / f"cuda_{part}.md").read_text(encoding="utf-8")
        assert "`python -m benchmarks.cuda.suite --device cpu --models tiny" in text
        assert f"torch {torch.__version__}" in text
        assert "no number here says anything about a GPU" in text


def test_a_short_budget_lists_what_was_not_run(tmp_path: Path) -> None:
    assert run(tmp_path, "--budget-s", "0", "--parts", "correctness", "speed", "--name", "short") == 0
    assert set(statuses(tmp_path, "correctness_short").values()) == {"not run: out of time", "needs CUDA"}
    rows = table(tmp_path, "speed_short")
    assert {row["status"] for row in rows} == {"not run: out of time", "needs CUDA"}
    assert len([row for row in rows if row["name"] == "lit_lora"]) == 3


def test_a_wrong_gradient_fails_its_checks_and_stops_the_speed_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, product = functional._add_product_, half_precision._product
    monkeypatch.setattr(functional, "_add_product_", lambda *args: add(*args[:3], args[3] * 1.2))
    monkeypatch.setattr(half_precision, "_product", lambda left, right, scale: product(left, right, scale * 1.2))
    assert run(tmp_path, "--parts", "correctness", "speed") == 1
    found = statuses(tmp_path, "correctness")
    assert (found["gradients, float32"], found["gradients, bfloat16"]) == ("failed", "failed")
    assert found["NF4 decode"] == "passed"
    speed = statuses(tmp_path, "speed")
    assert speed["parity with PEFT"] == "failed"
    assert speed["lit_lora"] == speed["peft"] == "not run: parity with PEFT: failed"
    assert not any(row.get("tokens_per_s") for row in table(tmp_path, "speed"))
    assert run(tmp_path, "--parts", "speed", "--anyway", "--frameworks", "lit_lora") == 1
    speed = statuses(tmp_path, "speed")
    assert (speed["parity with PEFT"], speed["lit_lora"]) == ("failed", "measured")


def failing(status: str, *, unless: tuple[str, ...] = ()) -> Any:
    """Workers whose measurements come to nothing, apart from those named."""

    class Failing(InProcess):
        def run(self, measurement: Measurement, limit_s: float) -> Outcome:
            if measurement.measure in unless:
                return super().run(measurement, limit_s)
            return Outcome(status, {}, 1.0, "the last words")

    return Failing


@pytest.mark.parametrize("status", ["error: OSError: no", "out of memory", "stopped after 9 s", "failed"])
@pytest.mark.parametrize("unless", [(), ("initial_adapter", "facts", "longest_context"), ("estimates", "peaks")])
def test_whatever_fails_every_row_is_there_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str, unless: tuple[str, ...]
) -> None:
    command = ["--device", "cpu", "--models", TINY, "--output", str(tmp_path), "--steps", "1", "--rounds", "1"]
    assert cuda_suite.main([*command, "--context-gb", "0.02", "--name", "n"], start=failing(status, unless=unless)) == 1
    told = capsys.readouterr().out.splitlines()
    for part, num_rows in {"correctness": 7, "memory": 3, "speed": 17}.items():
        rows = table(tmp_path, f"{part}_n")
        assert len(rows) == num_rows
        allowed = ("not run: ", "needs CUDA", status, "passed", "measured")
        assert all(row["status"].startswith(allowed) for row in rows)
        for row in rows:
            assert any(line.startswith(f"| {row['name']} |") and row["status"][:100] in line for line in told)
    assert "the last words" in (tmp_path / "cuda_log_n.txt").read_text()


def test_the_table_says_what_a_context_reached_when_its_estimate_failed() -> None:
    row: Row = {"name": "longest context", "limit_gb": 8, "reached_tokens": 512, "status": "measured"}
    assert cuda_plan.result(row) == "512 tokens in 8 GB, estimated not"


def test_a_profiled_step_is_told_apart_and_not_timed(tmp_path: Path) -> None:
    class Range:
        def __init__(self, us: float) -> None:
            self.us = us

        def elapsed_us(self) -> float:
            return self.us

    def event(name: str, device: str, us: float = 0.0) -> Any:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=Range(us))

    found = tally(
        [
            *(event(name, "CUDA", us) for name, us in (("gemm", 100.0), ("gemm", 300.0), ("add", 500.0))),
            *(event(name, "CUDA", 1.0) for name in ("Memcpy HtoD (Pageable -> Device)", "Memset (Device)")),
            *(event(f"cuda{name}", "CPU") for name in ("LaunchKernel", "StreamSynchronize", "DeviceSynchronize")),
        ]
    )
    assert found == {
        "launches": 3, "copies": 2, "waits": 1, "gpu_ms": pytest.approx(0.902),
        "longest_kernels": "0.50 ms add; 0.40 ms gemm",
    }  # fmt: skip
    clock = StepClock(on_cuda=False, last=2, profile=True)
    clock.end()
    clock.end()
    torch.ones(2) + 1
    clock.end()
    assert len(clock.ends_s()) == 2
    assert clock.profiled["launches"] == 0


def test_gpu_tests_are_collected_from_the_files_that_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    started = subprocess.Popen

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return started(["echo", "7 passed in 1.00s"], **options)

    monkeypatch.setattr(correctness.subprocess, "Popen", run)
    assert correctness.gpu_tests({})["status"] == "passed"
    files = [Path(argument).name for argument in commands[0] if argument.endswith(".py")]
    assert {"test_throughput.py", "test_gradient_norm.py", "test_memory_profiler.py"} <= set(files)
    assert "test_fetch.py" not in files


@pytest.mark.parametrize("call", ["small", "checks", "7b"])
def test_the_calls_are_ones_that_the_suite_takes(call: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": "echo"}
    script = cuda_suite.RESULTS.parent / "cuda" / "calls.sh"
    told = subprocess.run([script, call, tmp_path], env=environment, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(told)
    assert (program, arguments[0]) == ("-m", "benchmarks.cuda.suite")
    args = cuda_suite._parser().parse_args(arguments[1:])
    assert args.budget_s + 30 < 600
    assert Path(args.output) == tmp_path
    assert set(args.models) <= {TINY, *cuda_suite.ARCHITECTURES}


def test_a_process_that_fails_is_told_and_does_not_stop_the_next(tmp_path: Path) -> None:
    broken = Measurement("correctness", "broken", "nf4_decode", {})
    good = Measurement("correctness", "good", "products", {"device": "cpu"})
    told: list[int] = []

    def start(folder: Path, number: int) -> Any:
        return (Worker if number == 1 else InProcess)(folder, number)  # a real process is slow to start

    suite = cuda_suite.Suite(tmp_path, 120.0, num_ready=2, start=start)
    try:
        rows = cuda_suite.run_part(suite, "correctness", [broken, good], lambda part, rows: told.append(len(rows)), {})
    finally:
        suite.close()
    assert [row["status"] for row in rows] == ["error: KeyError: 'device'", "measured"]
    assert rows[1]["tflops"] > 0
    assert [cuda_plan.is_bad(row) for row in rows] == [True, False]
    assert told == [1, 2]


def test_a_process_that_hangs_is_stopped(tmp_path: Path) -> None:
    worker = Worker(tmp_path, 1)
    outcome = worker.run(Measurement("correctness", "slow", "products", {"device": "cpu"}), 0.1)
    assert outcome.status == "stopped after 0 s"
    assert cuda_plan.is_bad({"status": outcome.status})
    assert not cuda_plan.is_bad({"status": f"{outcome.status}: out of time"})


def test_a_process_that_dies_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_worker.sys, "executable", "/bin/false")
    worker = Worker(tmp_path, 1)
    worker.wait_ready(10.0)
    outcome = worker.run(Measurement("correctness", "dies", "products", {"device": "cpu"}), 10.0)
    assert outcome.status.startswith("error: the process ended with code 1")


@pytest.mark.parametrize(("limit", "expected"), [(100, 0), (1000, 768), (10_000, 9728), (1_000_000, 999_936)])
def test_the_longest_length_by_estimate_is_found_with_few_traces(limit: int, expected: int) -> None:
    traced: list[int] = []

    def need(length: int) -> int:
        traced.append(length)
        return length + length // 100

    reached = longest_fitting(need, limit)
    assert need(reached) <= limit or reached == 0
    assert need(reached + max(GRANULARITY, reached // 64)) > limit
    assert reached == pytest.approx(expected, rel=0.02)
    assert len(set(traced)) <= 13


@pytest.mark.parametrize("true", [700, 20_000, 26_000, 60_000])
def test_the_longest_context_is_confirmed_by_running_around_the_estimate(true: int) -> None:
    reached, failed = confirm(lambda length: length <= true, 25_000, 60.0)
    assert reached <= true
    assert failed is None or failed > true
    if true in (20_000, 26_000):
        assert failed is not None
        assert failed - reached <= max(GRANULARITY, 25_000 // 16)


def test_a_length_that_runs_out_of_memory_does_not_fit(tmp_path: Path) -> None:
    class Full:
        base = base_of(TINY, tmp_path)

        def compute_loss(self, batch: Any) -> None:
            raise torch.OutOfMemoryError(f"{batch['input_ids'].numel()} tokens")

    module: Any = Full()
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert not _step_fits(module, torch.optim.SGD([parameter], lr=0.1), 32, "cpu")


def test_on_cuda_the_clock_waits_after_the_first_step_and_the_warm_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            Event.made += 1
            self.at_ms = 100.0 * Event.made

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(Event.made))
    clock = StepClock(on_cuda=True, warm_up=3)
    for _ in range(5):
        clock.end()
    ends_s = clock.ends_s()
    assert waits == [1, 3]
    assert [end - ends_s[0] for end in ends_s] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=1e-6)


def test_memory_verdicts_follow_from_the_measured_rows() -> None:
    def peak(method: str, allocated_mb: float, **fields: Any) -> Row:
        row = {"name": "peak of a step", "model": "m", "batch": "1 x 8", "recomputed": "all", "status": "measured"}
        measured = {"allocated_mb": allocated_mb, "workspace_mb": 8.0, "estimated_allocated_mb": 100.0}
        return {**row, "method": method, **measured, **fields}

    lora, half, over = cuda_plan.finished(
        "memory", [peak("LoRA, bf16", 208.0), peak("QLoRA, NF4-DQ", 103.0, holds=True), peak("x", 111.0, holds=False)]
    )
    assert (lora["status"], half["status"], over["status"]) == ("measured", "passed", "failed")
    assert (half["at_most_half"], over["at_most_half"]) == (True, False)
    assert (half["estimate_within"], lora["estimate_within"]) == (False, False)
    assert half["estimate_error"] == pytest.approx(100 / 95 - 1)


def test_flops_of_a_step_count_what_the_formula_says(tmp_path: Path) -> None:
    base = base_of(TINY, tmp_path)
    ids, mask = [5] * 10, [False] * 4 + [True] * 6
    linear = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    lora = 3 * 8 * (2 * 256 + 2 * 192 + 3 * 384)
    expected = 10 * (4 * linear + 6 * lora) + 6 * 4 * 384 * 128 + 7 * 3 * 128 * 10**2
    assert step_flops({"base": base}, [(ids, mask)]) == expected
    assert config_of(base).num_hidden_layers == 3


def test_lengths_are_natural_and_the_same_each_time() -> None:
    made = natural(400, 1000)
    lengths = sorted(len(ids) for ids, _ in made)
    assert made == natural(400, 1000)
    assert lengths[0] >= 32
    assert lengths[-1] <= 1024
    assert lengths[200] == pytest.approx(190, rel=0.1)
    assert sum(sum(mask) for _, mask in made) / sum(lengths) == pytest.approx(0.59, abs=0.01)


def test_results_of_a_cpu_do_not_land_among_those_of_a_gpu() -> None:
    with pytest.raises(SystemExit, match="set --output"):
        cuda_suite.main(["--device", "cpu", "--models", TINY])
    with pytest.raises(SystemExit, match="known are tiny"):
        cuda_suite.main(["--device", "cpu", "--models", "nothing", "--output", "x"])
