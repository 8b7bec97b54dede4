"""Generated nonsense, from a fixed seed: data files, adapter files, configs. Each is taken or refused with a message.

Refused is an exception that the command line shows as one line (``ValueError``, ``OSError``); anything else would be
a traceback. A refusal has to name the file; of a config, every faulty setting.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults.runs import Budget, Project

EXAMPLES = 100

_integers = st.integers(-(10**18), 10**18)  # longer ones are no YAML of ours: the file is refused, whatever they are of
_plain = st.recursive(
    st.none() | st.booleans() | _integers | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_content = st.text(max_size=20) | _plain
_turn = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["system", "user", "assistant", "tool", ""]) | _plain, "content": _content}
)
_row = st.one_of(
    st.fixed_dictionaries({"prompt": _content}, optional={"completion": _content}),
    st.fixed_dictionaries({"messages": st.lists(_turn, max_size=4) | _plain}),
    st.fixed_dictionaries({"text": _content}),
    _plain,
)
_line = st.one_of(
    _row.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=30),
    st.just(b'{"prompt": "a", "completion": "b"}'),
    st.just(b"[" * 100_000),
    _row.map(lambda row: json.dumps(row).encode()[:-1]),
)
_data = st.lists(_line, max_size=6).map(b"\n".join)

_KEYS = ["peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora", "rank_pattern"]
_KEYS += ["alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "a_field_of_the_future"]
_values = st.sampled_from(["LORA", "IA3", "../../etc", -1, 0, 2, 10**12, [], ["q_proj"], {}, {"q_proj": 0}, True, None])
_adapter_config = st.dictionaries(st.sampled_from(_KEYS), _values | _plain, min_size=1, max_size=4)
_tensors = st.dictionaries(
    st.text(max_size=8) | st.just("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    st.lists(st.integers(0, 3), max_size=3),
    max_size=3,
)
_header = st.binary(max_size=60) | st.integers(0, 2**64 - 1).map(lambda size: size.to_bytes(8, "little") + b"{}")

_word = st.text(alphabet="qwxzß ", min_size=1, max_size=8).filter(str.strip)
_no_number = _word | st.lists(_integers, min_size=1, max_size=2) | st.dictionaries(_word, st.none(), min_size=1)
_below_1 = st.integers(-(10**18), 0)
_negative = st.integers(-(10**18), -1)
_no_rate = st.floats(max_value=0) | st.sampled_from([float("nan"), float("inf")])
_no_share = st.floats(min_value=1.01) | st.floats(max_value=-0.01)
_FAULTS: dict[str, Any] = {
    "seed_everything": _negative | _word,
    "trainer.max_steps": st.integers(-(10**18), -2) | _no_number,
    "trainer.accumulate_grad_batches": _below_1 | _no_number,
    "trainer.gradient_clip_val": _no_rate.filter(bool) | _word,
    "trainer.check_val_every_n_epoch": _below_1,
    "trainer.val_check_interval": _negative | _word,
    "trainer.devices": _below_1.map(lambda count: min(count, -2) if count else 0) | _word,
    "trainer.precision": _word | st.just("16-true"),
    "trainer.strategy": st.sampled_from(["fsdp", "deepspeed", "dp"]),
    "model.base": _word.map("./".__add__) | _word.map("random:".__add__),
    "model.lora": _word | st.lists(_integers),
    "model.lora.r": _below_1 | _no_number,
    "model.lora.lora_alpha": _no_rate | _word,
    "model.lora.lora_dropout": _no_share | _word,
    "model.lora.rank_pattern": st.dictionaries(_word, _below_1, min_size=1),
    "model.quantization.block_size": st.integers(1, 31) | _no_number,
    "model.optimization.learning_rate": _no_rate | _no_number,
    "model.optimization.weight_decay": st.floats(max_value=-0.01) | _no_number,
    "model.optimization.warmup_ratio": _no_share | _no_number,
    "model.optimization.lr_schedule": _word,
    "model.dtype": _word,
    "model.step.recompute": _word,
    "data.train": _word.map("{}.jsonl".format),
    "data.tokenizer": _word,
    "data.format": _word,
    "data.batch_size": _below_1 | _no_number,
    "data.max_length": st.integers(-(10**18), 1) | _no_number,
    "data.validation_fraction": _no_share | _no_number,
    "data.num_workers": _negative,
    "data.limit": _below_1,
    "data.seed": _negative,
    "checkpoint.every_n_steps": _negative | _no_number,
    "checkpoint.keep_last": _below_1,
    "checkpoint.mode": _word,
    "gradient_norm.window": st.integers(-(10**18), 9) | _no_number,
    "gradient_norm.explosion_factor": st.floats(max_value=1),
    "convergence.window": _below_1,
    "convergence.min_decrease": st.floats(min_value=1),
    "memory.budget_mib": _no_rate.filter(lambda value: value <= 0),
    "export.every_n_steps": _below_1,
    **{
        f"{group}.{name}": _plain
        for group in ("trainer", "model", "data", "memory")
        for name in ("é", "batchsize", "x")
    },
    **{group: _word | _integers | st.lists(_integers, min_size=1) for group in ("trainer", "model", "data")},
}
"""Setting -> values that it must not have, each the only fault of its kind in an otherwise sound config."""


def _independent(keys: tuple[str, ...]) -> bool:
    """One key that lies in another would replace it."""
    return not any(one != other and f"{one}.".startswith(f"{other}.") for one in keys for other in keys)


_faulty_keys = st.lists(st.sampled_from(sorted(_FAULTS)), min_size=1, max_size=2, unique=True).filter(_independent)
_faults = _faulty_keys.flatmap(lambda keys: st.fixed_dictionaries({key: _FAULTS[key] for key in keys}))


def bad_inputs(project: Project, seed_: int, budget: Budget) -> list[tuple[str, int, list[str]]]:
    """Name, number of inputs and failures of each kind."""
    work = project.folder / "bad"
    work.mkdir()
    kinds: dict[str, tuple[Any, Callable[[Any], str | None]]] = {
        "generated data file": (_data, lambda data: _read_data(work, data)),
        "generated adapter config": (_adapter_config, lambda changes: _read_config(work, changes)),
        "generated adapter weights": (_tensors | _header, lambda content: _read_weights(work, content)),
        "generated training config": (_faults, lambda faults: _parse_config(project, faults)),
    }
    return [(name, *_run(strategy, seed_, feed, name, budget)) for name, (strategy, feed) in kinds.items()]


def _run(
    strategy: Any, seed_: int, feed: Callable[[Any], str | None], name: str, budget: Budget
) -> tuple[int, list[str]]:
    tried, failures = 0, []

    @seed(seed_)
    @settings(
        max_examples=EXAMPLES, database=None, deadline=None, derandomize=False, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def each(value: Any) -> None:
        nonlocal tried
        if not budget.allows(name):
            return
        tried += 1
        try:
            problem = feed(value)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            failures.append(f"{value!r:.300}: {problem}")
            print(f"FAILED {failures[-1]}", flush=True)

    each()
    return tried, failures


def _refused(action: Callable[[], Any], name: str) -> str | None:
    try:
        action()
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError) or name not in str(error):
            return f"a refusal that does not name the file: {error!r}"
    return None


def _read_data(work: Path, data: bytes) -> str | None:
    from lit_lora.base.load import load_tokenizer
    from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source

    path = work / "data.jsonl"
    path.write_bytes(data)
    tokenizer = load_tokenizer("bytes")
    return _refused(
        lambda: tokenize_source(str(path), tokenizer, SourceSettings(), cache_dir=work / "cache"), path.name
    )


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _adapter(work: Path) -> Path:
    from lit_lora import LoRAConfig, inject_lora, save_adapter

    model = _model()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    return save_adapter(model, work / "adapter")


def _load(folder: Path) -> str | None:
    from lit_lora import load_adapter

    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    problem = _refused(lambda: load_adapter(model, folder), folder.name)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    if any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
        return "the base changed"
    return problem


def _read_config(work: Path, changes: dict[str, Any]) -> str | None:
    folder = _adapter(work)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return _load(folder)


def _read_weights(work: Path, content: Any) -> str | None:
    from safetensors.torch import save_file

    folder = _adapter(work)
    path = folder / "adapter_model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({name: torch.zeros(shape) for name, shape in content.items()}, path)
    return _load(folder)


def _parse_config(project: Project, faults: dict[str, Any]) -> str | None:
    """``fit`` with a sound config, but for these settings: all of them have to be named before anything is loaded."""
    from lit_lora.__main__ import main

    config = project.config("bad")
    for key, value in faults.items():
        *groups, name = key.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    path = project.folder / "bad.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    error, arguments = io.StringIO(), sys.argv
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            main(["fit", "--config", str(path)])
    except SystemExit as exit_:
        text = error.getvalue()
        if exit_.code not in (1, 2) or "Traceback" in text or "lit-lora: error: " not in text:
            return f"exit {exit_.code}: {text}"
        unnamed = [key for key in faults if not re.search(rf"(?<![\w.]){key}(?![\w.])", text)]
        return f"does not name {unnamed}: {text}" if unnamed else None
    finally:
        sys.argv = arguments
    return "it ran"
