"""The numbers of the README and of ``docs/`` are those of the files that were measured, or of the code."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from statistics import median

import pytest
import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.load import load_base_model
from tests.promises.sentences import PROJECT

README = (PROJECT / "README.md").read_text()
RESULTS = PROJECT / "benchmarks/results"


def cells_below(header: str, text: str) -> Iterator[list[str]]:
    """Rows of the table whose header line begins so."""
    lines = text.split(header, 1)[1].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]


def measured(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def prose(document: str) -> str:
    return " ".join((PROJECT / document).read_text().split())


def medians(name: str) -> dict[str, dict[str, float]]:
    """Column medians of each framework."""
    rows = measured(name)
    return {
        framework: {
            column: median(float(row[column]) for row in rows if row["framework"] == framework)
            for column in rows[0]
            if column not in ("round", "framework")
        }
        for framework in {row["framework"] for row in rows}
    }


def test_the_faults_are_those_of_the_suite():
    header = "| fault | tried | survived |"
    page = (PROJECT / "docs/faults.md").read_text()
    faults = list(cells_below(header, page))
    result = (RESULTS / "faults.md").read_text()
    assert faults == list(cells_below(header, result))
    assert all(tried == survived for _, tried, survived in faults)
    total = sum(int(tried) for _, tried, _ in faults)
    assert total >= 900
    (seconds, cores), *_ = re.findall(r"(\d+) s on (\d+) cores", result)
    assert f"{total:,} faults were tried, in {seconds} s on {cores} CPU cores" in prose("docs/faults.md")
    assert f"{total:,} of {total:,} injected faults survived" in README


def speed_table() -> dict[str, list[str]]:
    """Rows of docs/speed.md, by the framework that was measured."""
    rows = list(cells_below("| | real tokens/s | step (s) |", (PROJECT / "docs/speed.md").read_text()))
    return dict(zip(("lit_lora", "peft", "trl", "trl_tuned", "limit"), rows, strict=True))


def test_the_table_of_speed_is_what_was_measured():
    speed = medians("train_natural_lora")
    for framework, row in speed_table().items():
        of = speed[framework]
        assert row[1:4] == [f"{of['tokens_per_s']:.0f}", f"{of['median_step_s']:.2f}", f"{of['peak_rss_mib']:,.0f}"]
        if framework != "limit":
            losses = [float(loss) for loss in row[4].split(", ")]
            assert losses == pytest.approx([of["first_loss"], of["last_loss"]], abs=1e-4)


STARTS = {"freeze_A": "LoRA-FA", "freeze_A` with `eva": "eva, LoRA-FA", "use_rslora": "rsLoRA", "use_dora": "DoRA"}
STARTS |= {"lora_plus_ratio` 4": "LoRA+ (4)", "4 bits, `loftq`, less 4 bits": "4 bits, loftq"}
"""Rows of the table in docs/adapters.md that are called otherwise in the measurement."""


def test_the_table_of_starts_is_what_was_measured():
    page = (PROJECT / "docs/adapters.md").read_text()
    rows = measured("starts")
    losses = {(row["variant"], row["seed"]): float(row["val_loss"]) for row in rows}
    (first, *shown) = cells_below("| | difference, by seed |", page)
    assert first[0] == "the default start"
    assert {STARTS.get(name, name) for name, *_ in shown} == {v for v, _ in losses} - {"default"}
    for name, by_seed, mean, step_s, start_s in shown:
        variant = STARTS.get(name, name)
        reference = "4 bits" if variant == "4 bits, loftq" else "default"
        differences = [losses[variant, seed] - losses[reference, seed] for seed in "012"]
        assert by_seed.split(", ") == [f"{difference:+.3f}" for difference in differences]
        assert float(mean) == pytest.approx(sum(differences) / 3, abs=6e-4)
        mine = [row for row in rows if row["variant"] == variant]
        assert float(step_s) == pytest.approx(median(float(row["step_s"]) for row in mine), abs=6e-3)
        assert float(start_s) == pytest.approx(median(float(row["start_s"]) for row in mine), abs=0.6)


RATIO = re.compile(r"(\d+\.\d+)\s(?:times|of the memory)[^(.;]*\(([\d,]+) / ([\d,]+)\)")


def test_a_ratio_is_that_of_the_numbers_beside_it():
    """And these numbers stand in the tables above."""
    page = (PROJECT / "docs/speed.md").read_text()
    ratios = RATIO.findall(" ".join(page.split()))
    assert len(ratios) == 4
    for said, one, other in ratios:
        assert f"| {one} |" in page.replace("**", "")
        assert f"| {other} |" in page
        one, other = (float(number.replace(",", "")) for number in (one, other))
        assert f"{one / other:.{len(said.split('.')[1])}f}" == said


def test_the_readme_repeats_the_speed():
    rows = speed_table()
    table = prose("README.md")
    assert f"{rows['lit_lora'][1]} tokens/s; PEFT + Trainer {rows['peft'][1]}, TRL {rows['trl'][1]}" in table
    assert f"peak memory {rows['lit_lora'][3]} MiB; PEFT + Trainer {rows['peft'][3]}, TRL {rows['trl'][3]}" in table
    speed, memory = (
        float(rows["lit_lora"][n].replace(",", "")) / float(rows["peft"][n].replace(",", "")) for n in (1, 3)
    )
    assert f"{speed:.1f} times the tokens per second of PEFT with transformers' Trainer" in table
    assert f"in {memory:.2f} of its memory" in table
    exact = re.search(
        r"equal PEFT's within (\S+) \(the largest is (\S+)\)", (RESULTS / "train_natural_lora.md").read_text()
    )
    assert f"adapter gradients within {exact[1]} of PEFT's, the largest being {exact[2]}" in table
    assert f"equal PEFT's within {exact[1]}; the largest is {exact[2]}" in prose("docs/speed.md")


def test_speed_on_other_work_is_what_was_measured():
    rows = list(
        cells_below("| | lit_lora, tokens/s | PEFT + Trainer, tokens/s |", (PROJECT / "docs/speed.md").read_text())
    )
    for row, name in zip(rows, ("train_natural_lora", "train_dense_lora", "train_natural_qlora"), strict=True):
        found = medians(name)
        assert row[1:] == [f"{found[framework]['tokens_per_s']:.0f}" for framework in ("lit_lora", "peft")]
    ablation = (RESULTS / "ablation_natural_lora.md").read_text()
    (slower,) = re.findall(r"^\| no_onednn \|[^|]*\|[^|]*\| ([\d.]+) \|", ablation, re.MULTILINE)
    assert f"runs at {slower} of its speed" in prose("docs/speed.md")


def test_speed_on_another_processor_is_what_was_measured():
    found = medians("train_natural_lora_zen4")
    rows = list(cells_below("| on Zen 4 | lit_lora |", (PROJECT / "docs/speed.md").read_text()))
    for row, column in zip(rows, ("tokens_per_s", "peak_rss_mib"), strict=True):
        assert row[1:] == [f"{found[framework][column]:,.0f}" for framework in ("lit_lora", "peft", "limit")]
    speed, memory = (found["lit_lora"][column] / found["peft"][column] for column in ("tokens_per_s", "peak_rss_mib"))
    assert f"on Zen 4 {speed:.1f} times in {memory:.2f}, in bfloat16" in prose("README.md")


def test_speed_in_bfloat16_is_what_was_measured():
    page = prose("docs/speed.md")
    rows = cells_below("| in bfloat16 | lit_lora |", (PROJECT / "docs/speed.md").read_text())
    for row, name in zip(rows, ("natural_lora", "dense_lora", "natural_qlora"), strict=True):
        found = {framework: f"{of['tokens_per_s']:.0f}" for framework, of in medians(f"train_{name}_bf16").items()}
        trl = max(found.get("trl", "-"), found.get("trl_tuned", "-"))
        assert row[1:] == [found["lit_lora"], found["peft"], trl, found.get("limit", "-")]
    ours, peft = (medians("train_natural_lora_bf16")[name] for name in ("lit_lora", "peft"))
    assert f"natural lengths is {ours['peak_rss_mib']:,.0f} MiB, PEFT's {peft['peak_rss_mib']:,.0f}." in page
    assert f"its loss is {peft['last_loss']:.4f}, lit_lora's {ours['last_loss']:.4f}" in page
    speed, memory = (ours[key] / peft[key] for key in ("tokens_per_s", "peak_rss_mib"))
    readme = prose("README.md")
    assert f"in bfloat16 {speed:.1f} times in {memory:.2f})." in readme
    both = [medians("train_natural_lora_bf16")[name] for name in ("lit_lora", "peft", "trl_tuned")]
    assert "In bfloat16 " + ", ".join(f"{of['tokens_per_s']:.0f}" for of in both) in readme
    assert "In bfloat16 " + ", ".join(f"{of['peak_rss_mib']:,.0f}" for of in both) in readme
    for peer, rows in {"litgpt": ("litgpt", "litgpt_mixed"), "torchtune": ("torchtune",)}.items():
        beside = {name: of["tokens_per_s"] for name, of in medians(f"train_natural_lora_bf16_{peer}").items()}
        best = max(beside[row] for row in rows)
        said = f"{best:.0f} tokens/s beside lit_lora's {beside['lit_lora']:.0f} and PEFT's {beside['peft']:.0f}"
        assert said in page


def test_answers_are_as_fast_as_was_measured():
    found = re.findall(
        r"^\| (lit_lora|transformers|PEFT), .* \| (\d+) \[", (RESULTS / "answers.md").read_text(), re.MULTILINE
    )
    base, adapter = cells_below("| answers | lit_lora |", (PROJECT / "docs/speed.md").read_text())
    assert [*base[1:], *adapter[1:]] == [speed for _, speed in found]
    assert [name for name, _ in found] == ["lit_lora", "transformers", "lit_lora", "PEFT"]


def test_the_readme_counts_architectures_as_the_sweep_did():
    equal, not_built, refused = re.search(
        r"^(\d+) equal, (\d+) not built, (\d+) refused\.$",
        (PROJECT / "docs/architectures.md").read_text(),
        re.MULTILINE,
    ).groups()
    assert f"{equal} architectures of transformers" in README
    assert f"{refused} are refused, {not_built} could not be built" in README


def test_the_readme_repeats_qlora_and_memory():
    losses = {row["method"]: float(row["val_loss_end"]) for row in measured("qlora_vs_lora")}
    lora, _, quantized, *_ = losses.values()
    assert f"validation loss after 100 steps {quantized:.3f} in 4 bits; LoRA {lora:.3f}" in README
    estimated = next(iter(cells_below("| | estimated | alive |", (PROJECT / "docs/memory.md").read_text())))
    assert f"{estimated[1]} MB estimated, {estimated[2]} MB alive" in README


def test_the_table_of_memory_is_what_was_estimated():
    page = (PROJECT / "docs/memory.md").read_text()
    estimates = measured("memory_estimates")
    assert f"has {len(estimates)} rows" in prose("docs/memory.md")
    rows = list(cells_below("| model | batch (examples x tokens) |", page))
    assert len(rows) == 4
    for model, batch, recomputed, lora, qlora, bound in rows:
        examples, tokens = batch.split(" x ")
        of = {
            row["method"]: row
            for row in estimates
            if (row["model"], row["examples"], row["tokens_each"], row["recomputed"], row["r"])
            == (model.lower(), examples, tokens, recomputed, "16")
        }
        lora_mb, qlora_mb, bound_mb = (float(cell.replace(",", "")) for cell in (lora, qlora, bound))
        assert lora_mb == pytest.approx(float(of["LoRA, bf16"]["reserved_mb"]), abs=0.6)
        assert qlora_mb == pytest.approx(float(of["QLoRA, NF4-DQ"]["reserved_mb"]), abs=0.6)
        assert qlora_mb < bound_mb == float(of["QLoRA, NF4-DQ"]["bound_mb"])


def test_the_speed_on_a_gpu_is_what_was_measured():
    page = (PROJECT / "docs/cuda.md").read_text()
    rows = {row[0].lower(): row[1:] for row in cells_below("| model | lit_lora | without graphs |", page)}
    assert list(rows) == ["smollm2-135m", "tinyllama-1.1b", "llama-2-7b"]
    columns = [
        ("lit_lora", "tokens_per_s"), ("no_cuda_graphs", "tokens_per_s"), ("peft", "tokens_per_s"),
        ("peft_without_cudnn", "tokens_per_s"), ("peft_liger", "tokens_per_s"), ("lit_lora", "median_step_s"),
        ("peft", "median_step_s"),
    ]  # fmt: skip
    ratios = {}
    for model, cells in rows.items():
        measured_rows = measured("cuda_speed_7b" if model == "llama-2-7b" else "cuda_speed_small")
        mine = [row for row in measured_rows if row["model"] == model and row["status"] == "measured"]
        natural = {row["name"]: row for row in mine if row["workload"] == "natural"}
        for cell, (name, column) in zip(cells, columns, strict=True):
            if cell:
                value = float(natural[name][column]) * (1000 if column == "median_step_s" else 1)
                number = cell.removesuffix(" ms").replace(",", "")
                assert float(number) == round(value, len(number.partition(".")[2])), (model, name, column)
        speeds = {name: float(row["tokens_per_s"]) for name, row in natural.items()}
        best = max(speed for name, speed in speeds.items() if name.startswith("peft"))
        ratios[model] = round(speeds["lit_lora"] / speeds["peft"]), round(speeds["lit_lora"] / best)
        if model != "smollm2-135m":
            for row in mine:
                if row["name"] == "lit_lora" and row["workload"] == "dense":
                    assert f"{float(row['tokens_per_s']):,.0f}" in page
    small, medium, large = ratios.values()
    said = prose("README.md")
    assert f"SmolLM2-135M trained {small[0]} times as fast as with PEFT" in said
    assert f"TinyLlama-1.1B {medium[0]} times, Llama-2-7B {large[0]} times" in said
    assert f"best that was found for PEFT there, {small[1]}, {medium[1]} and {large[1]} times" in said
    checks = {(row["name"], row["method"]): row for row in measured("cuda_correctness_checks")}
    of_the_suite = {row["status"] for (name, _), row in checks.items() if name != "tests marked gpu"}
    assert of_the_suite <= {"passed", "measured"}
    for key in (("gradients, float32", ""), ("gradients, bfloat16", "")):
        assert checks[key]["found"] in page


def test_the_size_of_data_is_what_was_measured():
    said = prose("docs/data.md")
    result = (RESULTS / "data_size.md").read_text()
    rows = {cells[0]: [float(cell.split(",")[0]) for cell in cells[1:]] for cells in cells_below("| | s |", result)}
    whole, masked, first, again = list(rows.values())[:4]
    assert f"{first[0]:.0f} seconds to the first batch and {first[3]:.2f} GiB, the second time {again[0]:.0f}" in said
    assert f"takes {whole[0]:.0f} seconds for the tokens alone, and {masked[0]:.0f} for" in said
    assert first[0] <= 1.3 * whole[0]


def test_the_longest_contexts_are_what_was_measured():
    page = (PROJECT / "docs/cuda.md").read_text()
    of = {row["limit_gb"]: row for row in measured("cuda_memory_checks") if row["name"] == "longest context"}
    rows = list(cells_below("| memory | tokens | estimated |", page))
    assert {memory.removesuffix(" GB") for memory, *_ in rows} == {f"{float(limit):g}" for limit in of}
    for memory, tokens, estimated in rows:
        found = next(row for limit, row in of.items() if f"{float(limit):g} GB" == memory)
        assert (tokens, estimated) == (f"{int(found['reached_tokens']):,}", f"{int(found['estimated_tokens']):,}")


def test_the_memory_on_a_gpu_is_what_was_measured():
    page = (PROJECT / "docs/cuda.md").read_text()
    of = {
        (row["model"], row["batch"], row["recomputed"], row["method"]): row
        for row in measured("cuda_memory_checks")
        if row["allocated_mb"]
    }
    rows = list(cells_below("| model | batch | recomputed | reserved MB |", page))
    assert len(rows) == 4
    for model, batch, recomputed, reserved, bound, lora in rows:
        key = (model.lower(), batch, recomputed)
        assert float(reserved.replace(",", "")) == round(float(of[*key, "QLoRA, NF4-DQ"]["reserved_mb"]))
        assert float(lora.replace(",", "")) == round(float(of[*key, "LoRA, bf16"]["reserved_mb"]))
        assert float(reserved.replace(",", "")) < float(bound.replace(",", ""))
        assert of[*key, "QLoRA, NF4-DQ"]["holds"] == "True"
    assert all(abs(float(row["estimate_error"])) < 0.01 for row in of.values())


def test_the_shares_of_memory_are_those_estimated():
    said = prose("docs/memory.md")
    by_case = {
        (r["model"], r["method"], r["tokens_each"], r["recomputed"]): r
        for r in measured("memory_estimates")
        if r["examples"] != "2"
    }
    for words, key in {
        "Llama-2-7B with 4 x 512 tokens, ": ("llama-2-7b", "QLoRA, NF4-DQ", "512", "all"),
        "TinyLlama with 4 x 512 tokens, ": ("tinyllama-1.1b", "QLoRA, NF4-DQ", "512", "all"),
        "with an 8-bit embedding ": ("tinyllama-1.1b", "QLoRA, NF4-DQ, 8-bit embedding", "512", "all"),
        "adapters on q_proj and v_proj, ": ("smollm2-135m", "QLoRA, NF4-DQ", "128", "all"),
    }.items():
        shares = re.search(re.escape(words) + r"(\d+)% and (\d+)%", said)
        assert shares, words
        row = by_case[key]
        for share, column in zip(shares.groups(), ("allocated_of_lora", "reserved_of_lora"), strict=True):
            assert int(share) == pytest.approx(100 * float(row[column]), abs=0.51), (words, column)
    saved = {
        row["model"]: float(row["saved_by_double_quant_mb"])
        for row in measured("memory_estimates")
        if row["saved_by_double_quant_mb"]
    }
    assert [round(saved[model]) for model in ("smollm2-135m", "tinyllama-1.1b", "llama-2-7b")] == [5, 45, 302]
    assert "saves 5 MB (SmolLM2), 45 MB (TinyLlama) and 302 MB (Llama-2-7B)" in said


def test_qlora_against_lora_is_what_was_measured():
    rows = list(cells_below("| | validation loss, start and end |", (PROJECT / "docs/qlora.md").read_text()))
    for row, found in zip(rows, measured("qlora_vs_lora"), strict=True):
        of = {name: float(value) for name, value in found.items() if name != "method" and value}
        assert [float(n) for n in row[1].split(", ")] == pytest.approx(
            [of["val_loss_start"], of["val_loss_end"]], abs=6e-4
        )
        assert float(row[2].rstrip("%")) == pytest.approx(100 * of["val_loss_drop"], abs=0.06)
        if row[3]:
            assert [float(n) for n in row[3].split(", ")] == pytest.approx([of["gap_start"], of["gap_end"]], abs=6e-4)
        assert float(row[4]) == pytest.approx(of["base_mib"], abs=0.6)
        assert [float(n) for n in row[5].split(", ")] == pytest.approx(
            [of["tensors_mib"], of["estimate_mib"]], abs=0.06
        )
        assert float(row[6]) == pytest.approx(of["tokens_per_s"], abs=0.6)


def test_the_memory_of_merging_is_what_was_measured():
    text = (PROJECT / "benchmarks/results/merge_memory.md").read_text()
    whole, parts = (float(row[2].replace(",", "")) for row in cells_below("| in memory |", text))
    said = " ".join((PROJECT / "docs/qlora.md").read_text().split())
    base = re.search(r"A Llama of ([\d,]+) MB", text)
    assert base is not None
    size = float(base[1].replace(",", "")) / 1e3
    assert f"for a base of {size:.1f} GB in float32, {parts / 1e3:.1f} GB instead of {whole / 1e3:.1f} GB" in said
    assert "equal bit for bit" in text


def test_trainable_parameters_are_those_of_the_model():
    rows = list(cells_below("| config | adapts |", (PROJECT / "docs/configs.md").read_text()))
    assert len(rows) == 4
    with torch.device("meta"):
        for _, adapts, counts in rows:
            targets = re.findall(r"\w+_proj", adapts)
            for rank, count in zip((4, 8, 16, 32), re.findall(r"[\d,]+\d", counts), strict=True):
                model = load_base_model("random:smollm2-135m")
                report = inject_lora(model, LoRAConfig(r=rank, target_modules=targets))
                assert f"{report.num_trainable:,}" == count


def test_the_limits_of_yaml_are_those_of_the_code():
    from lit_lora.files import strict_yaml

    said = prose("docs/command_line.md")
    assert f"more than {strict_yaml.MAX_NODES:,} values" in said
    assert f"more than {strict_yaml.MAX_DEPTH} levels" in said
    assert f"more than {strict_yaml.MAX_CHARACTERS // 1024} KiB" in said


def test_about_as_many_other_names_are_answered_as_is_said():
    from lit_lora.cli import synonyms

    assert "about two hundred and fifty other names" in prose("docs/command_line.md")
    assert len(synonyms.SYNONYMS) == pytest.approx(250, abs=15)


def test_the_rooms_of_the_architecture_are_those_that_imports_are_held_to():
    from tests.test_imports import FLOORS

    floors: list[set[str]] = []
    for floor, rooms, _ in cells_below(
        "| floor | room of `lit_lora/` |", (PROJECT / "docs/architecture.md").read_text()
    ):
        floors += [set()] if floor else []
        floors[-1] |= {name.removesuffix(".py") for name in re.findall(r"[\w.]+", rooms)}
    assert floors == list(FLOORS)
