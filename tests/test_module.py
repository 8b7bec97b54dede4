"""LoRALightningModule in real Trainer runs on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    SFTDataModule,
    assert_loss_convergence,
    load_adapter,
    load_base_model,
)
from lit_lora.callbacks import (
    GradientNormLogger,
    HFAdapterExport,
)
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.files.checkpoint import AtomicCheckpointIO, DamagedCheckpointError, read_checkpoint
from tests.tiny import SIZES, config, examples, grouped

LENGTHS = (7, 12, 5, 9, 14, 6, 8, 11)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama's config; its weights are random, from a fixed seed."""
    folder = tmp_path_factory.mktemp("base")
    config("Llama", initializer_range=0.2, vocab_size=260).save_pretrained(folder)
    return f"random:{folder}"


def _tokenized(lengths=LENGTHS):
    made = examples(lengths)
    return [
        TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy()) for i, (ids, mask) in enumerate(made)
    ]


def _loader(batch_size=1, collate=collate_packed, lengths=LENGTHS):
    return DataLoader(_tokenized(lengths), batch_size=batch_size, collate_fn=collate)


def _module(base, **options):
    torch.manual_seed(1)
    options.setdefault("lora", LoRAConfig(r=4))
    defaults = {"learning_rate": 0.01, "warmup_ratio": 0.0, "lr_schedule": "constant"}
    module = LoRALightningModule(base, **grouped(**{**defaults, **options}))
    module.configure_model()  # here, so that equal seeds make equal adapters
    return module


def _trainer(tmp_path, **options):
    defaults = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "plugins": [AtomicCheckpointIO()],
    }
    return L.Trainer(**{**defaults, **options})


def _adapters(module):
    return {name: p.detach().clone() for name, p in module.trainable_parameters().items()}


def _assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulating_equals_one_batch_on_ragged_examples(base, tmp_path, accumulate, collate, dtype):
    """To the rounding of a base in that dtype; means of means would be off by tenths."""
    near = 1 if dtype == "float32" else 500
    whole, parts = _module(base, dtype=dtype), _module(base, dtype=dtype)
    _trainer(tmp_path, max_steps=2).fit(whole, _loader(4, collate))
    _trainer(tmp_path, max_steps=2, accumulate_grad_batches=accumulate).fit(parts, _loader(4 // accumulate, collate))
    if dtype == "float32":  # AdamW's first steps go by signs, and the smallest gradients have either in bfloat16
        _assert_same(_adapters(whole), _adapters(parts), rtol=1e-4, atol=1e-6)
    for a, b in zip(whole.training_metrics.steps, parts.training_metrics.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5 * near)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4 * near)
        assert (a.num_tokens, a.num_target_tokens) == (b.num_tokens, b.num_target_tokens)


def test_a_short_last_window_is_normalised_by_its_own_tokens(base, tmp_path):
    lengths = (7, 12, 5)
    whole, parts = _module(base), _module(base)
    _trainer(tmp_path, max_epochs=1, max_steps=-1).fit(whole, _loader(2, lengths=lengths))
    _trainer(tmp_path, max_epochs=1, max_steps=-1, accumulate_grad_batches=2).fit(parts, _loader(1, lengths=lengths))
    _assert_same(_adapters(whole), _adapters(parts), rtol=1e-4, atol=1e-6)


def test_gradient_norm_is_that_of_the_mean_loss_per_token(base, tmp_path):
    module = _module(base)
    _trainer(tmp_path, max_steps=1).fit(module, _loader(8))
    fresh = _module(base)
    fresh.configure_model()
    output = fresh.compute_loss(next(iter(_loader(8))))
    (output.loss_sum / output.num_targets).backward()
    expected = torch.cat([p.grad.flatten() for p in fresh.trainable_parameters().values()]).norm()
    step = module.training_metrics.steps[0]
    assert step.grad_norm == pytest.approx(expected.item(), rel=1e-5)
    assert step.loss == pytest.approx((output.loss_sum / output.num_targets).item(), rel=1e-5)
    assert step.loss_scale == 1.0
    assert step.param_norm > 0


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first step is skipped
def test_an_overflow_under_fp16_takes_no_step_and_the_loss_scale_is_recorded(base, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = _module(base)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    _trainer(tmp_path, max_steps=40, plugins=plugins, callbacks=[GradientNormLogger()]).fit(module, _loader(4))
    steps = module.training_metrics.steps
    skipped = [not math.isfinite(step.grad_norm) for step in steps]
    assert 0 < sum(skipped) < 40
    scales = [2.0**40, *(step.loss_scale for step in steps)]
    assert [after / before for before, after in itertools.pairwise(scales)] == [0.5 if s else 1.0 for s in skipped]
    moved = [a.param_norm != b.param_norm for a, b in itertools.pairwise(steps)]
    assert moved == [not s for s in skipped[:-1]]


def test_loss_converges_and_only_adapters_move(base, tmp_path):
    module = _module(base)
    module.configure_model()
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    before = _adapters(module)
    _trainer(tmp_path, max_steps=60).fit(module, _loader(4))
    assert_loss_convergence(module.training_metrics.losses, 0.3, window=10)
    for name, parameter in module.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert all(not torch.equal(before[name], value) for name, value in _adapters(module).items())


def test_optimizer_gets_adapter_parameters_only(base, tmp_path):
    module = _module(base)
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(module, _loader())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.trainable_parameters().values()}
    assert all("lora_" in name for name in module.trainable_parameters())


def test_checkpoint_holds_adapters_only_and_loads_back(base, tmp_path):
    module = _module(base)
    trainer = _trainer(tmp_path)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert content["state_dict"].keys() == module.trainable_parameters().keys()
    assert content["lit_lora"]["base"] == base
    loaded = LoRALightningModule.load_from_checkpoint(tmp_path / "a.ckpt")
    _assert_same(_adapters(module), _adapters(loaded), rtol=0, atol=0)


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class SaveAfterBatches(L.Callback):
    """Save when this many micro-batches of the whole run are done."""

    def __init__(self, num_batches, path):
        self.num_batches, self.path = num_batches, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.num_batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("accumulate", "num_batches"), [(1, 3), (1, 5), (2, 3), (3, 7)])
def test_resumed_run_is_bit_identical(base, tmp_path, data_file, accumulate, num_batches, packing):
    """Mid-epoch, at an epoch's end, and inside an accumulation window; dropout on, examples shuffled."""
    path = tmp_path / "middle.ckpt"
    lora = LoRAConfig(r=4, lora_dropout=0.2)

    def fit(module, seed, **options):
        data = SFTDataModule(str(data_file), tokenizer="bytes", batch_size=2, packing=packing, cache_dir=tmp_path)
        L.seed_everything(seed)
        resume = options.pop("resume", None)
        trainer = _trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2, max_steps=-1, **options)
        trainer.fit(module, data, ckpt_path=resume)
        return trainer

    whole, resumed = (_module(base, lora=lora, lr_schedule="cosine") for _ in range(2))
    whole_trainer = fit(whole, 3, callbacks=[SaveAfterBatches(num_batches, path)])
    resumed_trainer = fit(resumed, 99, resume=path)

    _assert_same(_adapters(whole), _adapters(resumed), rtol=0, atol=0)
    timeless = [
        [dataclasses.replace(step, step_time_s=0) for step in m.training_metrics.steps] for m in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    moments = [trainer.optimizers[0].state_dict()["state"] for trainer in (whole_trainer, resumed_trainer)]
    for first, second in zip(moments[0].values(), moments[1].values(), strict=True):
        _assert_same(first, second, rtol=0, atol=0)
    assert whole_trainer.global_step == resumed_trainer.global_step


def test_another_base_is_refused(base, tmp_path):
    module = _module(base)
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    class OtherWeights(LoRALightningModule):
        def load_base(self):
            model = super().load_base()
            model.model.layers[1].mlp.up_proj.weight.data.add_(0.01)
            return model

    with pytest.raises(ValueError, match="another base"):
        _trainer(tmp_path).fit(OtherWeights(base, lora=LoRAConfig(r=4)), _loader(), ckpt_path=tmp_path / "a.ckpt")


def test_another_structure_is_refused_naming_the_field(base, tmp_path):
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(_module(base), _loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"model.lora.r was 4, is 8"):
        _trainer(tmp_path).fit(_module(base, lora=LoRAConfig(r=8)), _loader(), ckpt_path=tmp_path / "a.ckpt")


def test_damage_is_found_by_the_checksum(base, tmp_path):
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(_module(base), _loader())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values()))[0, 0] += 1
    torch.save(content, path)
    with pytest.raises(DamagedCheckpointError, match="does not match its checksum"):
        read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read_checkpoint(path)


def test_validation_reports_loss_perplexity_and_accuracy(base, tmp_path):
    module = _module(base)
    trainer = _trainer(tmp_path)
    (result,) = trainer.validate(module, _loader(3), verbose=False)
    batch = next(iter(_loader(8)))
    output = module.compute_loss(batch, accuracy=True)
    assert result["val_loss"] == pytest.approx((output.loss_sum / output.num_targets).item(), rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(torch.tensor(result["val_loss"]).exp().item(), rel=1e-5)
    assert result["val_token_accuracy"] == pytest.approx((output.num_correct / output.num_targets).item(), rel=1e-5)


def test_rank_scales_trainable_parameters_and_checkpoint_size(base, tmp_path):
    counts, sizes = [], []
    for r in (4, 8, 16, 32):
        module = _module(base, lora=LoRAConfig(r=r, target_modules=["q_proj", "v_proj"]))
        module.configure_model()
        counts.append(sum(p.numel() for p in module.trainable_parameters().values()))
        sizes.append(sum(p.numel() * p.element_size() for p in module.state_dict().values()))
    assert [count / counts[0] for count in counts] == [1, 2, 4, 8]
    assert [size / sizes[0] for size in sizes] == [1, 2, 4, 8]


def test_a_loss_of_your_own_can_build_on_the_language_models(base, tmp_path):
    class Doubled(LoRALightningModule):
        def compute_loss(self, batch, *, accuracy=False):
            output = super().compute_loss(batch, accuracy=accuracy)
            return output._replace(loss_sum=2 * output.loss_sum)

    plain, doubled = _module(base), Doubled(base, lora=LoRAConfig(r=4))
    _trainer(tmp_path, max_steps=1).fit(plain, _loader())
    _trainer(tmp_path, max_steps=1).fit(doubled, _loader())
    first = [module.training_metrics.losses[0] for module in (plain, doubled)]
    assert first[1] == pytest.approx(2 * first[0], rel=1e-5)


def test_a_cache_is_not_filled_twice_where_layers_are_recomputed(base):
    """As transformers' models make one unless they are told not to, and a loss of one's own may forget to tell them."""
    ids = torch.arange(3, 23).view(2, 10)
    mask = (torch.arange(10) < torch.tensor([[10], [6]])).long()
    gradients = []
    for recomputed in (False, True):
        module = _module(base, lora=LoRAConfig(r=4, init_lora_weights=False), recompute=recomputed)
        module.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=True).loss.backward()
        gradients.append([parameter.grad for parameter in module.trainable_parameters().values()])
    for recomputed, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_a_packed_fit_leaves_the_models_own_attention_in_place(tmp_path):
    """Gemma 2's has a soft cap, which transformers' SDPA attention does not know."""
    folder = tmp_path / "gemma2"
    options = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "initializer_range": 0.2}
    config("Gemma2", **options).save_pretrained(folder)
    module = _module(f"random:{folder}")
    trainer = _trainer(tmp_path, max_steps=3, callbacks=[HFAdapterExport()])
    trainer.fit(module, _loader(2), _loader(2, collate_padded))
    assert module.path.packed
    padded, packed = (
        trainer.validate(module, _loader(2, collate), verbose=False) for collate in (collate_padded, collate_packed)
    )
    assert padded[0]["val_loss"] == pytest.approx(packed[0]["val_loss"], rel=1e-5)
    fresh = load_base_model(f"random:{folder}").eval()
    load_adapter(fresh, tmp_path / "adapter")
    model = module.model.eval()
    ids, options = torch.tensor([[5, 6, 7, 8, 9, 10]]), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), fresh.generate(ids, **options))
    assert model.config._attn_implementation == fresh.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be in"),
        ({"optimizer": torch.optim.SGD, "weight_decay": 0.1}, "weight_decay has no effect"),
    ],
)
def test_settings_are_checked_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        LoRALightningModule("base", **grouped(**options))


def test_a_trainer_without_logs_trains_without_a_warning(base, tmp_path):
    module = _module(base)
    trainer = L.Trainer(barebones=True, accelerator="cpu", max_steps=2, default_root_dir=tmp_path)
    trainer.fit(module, _loader(4), _loader(4))
    assert len(module.training_metrics.steps) == 2


def test_a_checkpoint_of_weights_only_is_not_gone_on_from(base, tmp_path):
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(_module(base), _loader())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"weights.ckpt holds weights only .* TrainingCheckpoint"):
        _trainer(tmp_path).fit(_module(base), _loader(), ckpt_path=tmp_path / "weights.ckpt")
    loaded = LoRALightningModule.load_from_checkpoint(tmp_path / "weights.ckpt")
    _assert_same(_adapters(loaded), _adapters(trainer.lightning_module))


def test_own_optimizer_and_schedule_are_used(base, tmp_path):
    module = _module(
        base,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    _trainer(tmp_path, max_steps=3).fit(module, _loader())
    assert [step.learning_rate for step in module.training_metrics.steps] == [0.5, 0.25, 0.125]


def test_vocabulary_of_the_tiny_model_is_what_the_examples_use():
    assert max(max(ids) for ids, _ in examples(LENGTHS)) < SIZES["vocab_size"]
