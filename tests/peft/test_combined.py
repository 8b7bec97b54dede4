"""Several adapters made into one, and one at a lower rank: PEFT's ``add_weighted_adapter`` and ``torch.linalg.svd``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lit_lora import LoRAConfig, combine_adapters, compress_adapter, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.trained_on import TrainedOn, note, read_record
from lit_lora.interchange.stored_factors import read_factors
from tests.started_runs import lit_lora
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:The density 1.0"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:UserWarning"),  # its own lora_B.bias
    pytest.mark.filterwarnings("ignore:not adapted"),
]

IDS = torch.arange(24).view(2, 12) + 3
KINDS = {"Llama": ["q_proj", "down_proj", "embed_tokens"], "GPT2": ["c_attn", "c_fc"]}


def write(folder: Path, kind: str = "Llama", seed: int = 0, **settings: Any) -> str:
    torch.manual_seed(seed)
    fields = {"target_modules": KINDS[kind], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    model = peft.get_peft_model(language_model(kind), peft.LoraConfig(**fields))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def by_peft(kind: str, folders: list[str], weights: list[float], how: str, **more: Any) -> Any:
    model = peft.PeftModel.from_pretrained(language_model(kind), folders[0], "0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(number))
    model.add_weighted_adapter([str(n) for n in range(len(folders))], weights, "made", combination_type=how, **more)
    model.set_adapter("made")
    return model.eval()


DETERMINISTIC: list[tuple[str, list[float], dict[str, Any]]] = [
    ("linear", [0.7, 0.3], {}),
    ("linear", [0.7, -0.4, 1.5], {}),
    ("cat", [0.7, -0.3], {}),
    ("svd", [0.7, 0.3], {}),
    ("svd", [0.7, 0.3, 0.1], {"r": 3}),
    ("ties", [0.7, 0.3], {"density": 0.5}),
    ("ties", [1.0, 0.5, 0.25], {"density": 0.8, "majority_sign": "frequency"}),
    ("magnitude_prune", [0.7, 0.3], {"density": 0.3}),
    ("ties_svd", [0.7, 0.3], {"density": 0.5}),
    ("magnitude_prune_svd", [0.7, 0.3], {"density": 0.5, "r": 2}),
    ("dare_linear", [0.7, 0.3], {"density": 1.0}),
    ("dare_ties", [0.7, 0.3], {"density": 1.0}),
    ("dare_linear_svd", [0.7, 0.3], {"density": 1.0}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "weights", "more"), DETERMINISTIC)
def test_combined_adapters_are_those_of_peft(
    kind: str, how: str, weights: list[float], more: dict[str, Any], tmp_path: Path
) -> None:
    folders = [write(tmp_path / str(n), kind, seed=n, use_rslora=n == 1) for n in range(len(weights))]
    renamed = {"r": "svd_rank", "majority_sign": "majority_sign_method"}
    theirs = by_peft(kind, folders, weights, how, **{renamed.get(name, name): value for name, value in more.items()})
    made = combine_adapters(folders, tmp_path / "made", weights=weights, how=how, **more)  # type: ignore[arg-type]
    ours = language_model(kind)
    load_adapter(ours, made)
    layers = dict(lora_layers(ours))
    assert len(layers) == len(KINDS[kind]) * 2 - (kind == "Llama")
    for name, layer in layers.items():
        other = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.delta_weight(), _laid_out(other), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-3, rtol=1e-3)
        read_by_peft = peft.PeftModel.from_pretrained(language_model(kind), str(made)).eval()
        torch.testing.assert_close(ours(IDS).logits, read_by_peft(IDS).logits, atol=1e-4, rtol=1e-4)


def _laid_out(layer: Any) -> torch.Tensor:
    """PEFT gives the change of a ``Conv1D`` as that stores its weight."""
    delta: torch.Tensor = layer.get_delta_weight("made")
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_what_dare_keeps_is_a_matter_of_the_seed_and_peft_s_for_one_layer(how: Any, tmp_path: Path) -> None:
    folders = [write(tmp_path / str(n), seed=n, target_modules=r".*\.0\..*\.up_proj") for n in range(2)]
    made = [
        combine_adapters(folders, tmp_path / f"made{s}", weights=[1, 0.5], how=how, density=0.6, seed=s) for s in (3, 4)
    ]
    first, second = (read_factors(folder).layers for folder in made)
    ((name, factors),) = first.items()
    assert not torch.equal(factors.lora_A, second[name].lora_A)
    model = peft.PeftModel.from_pretrained(language_model(), folders[0], "0")
    model.load_adapter(folders[1], "1")
    bernoulli = torch.bernoulli
    generator = torch.Generator().manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda tensor: bernoulli(tensor, generator=generator))
        model.add_weighted_adapter(["0", "1"], [1.0, 0.5], "made", combination_type=how, density=0.6)
    theirs = model.base_model.model.get_submodule(name)
    torch.testing.assert_close(factors.lora_A, theirs.lora_A["made"].weight)
    torch.testing.assert_close(factors.lora_B, theirs.lora_B["made"].weight)


@pytest.mark.parametrize(
    ("second", "settings", "named"),
    [
        ({"r": 2}, {"how": "linear"}, r"ranks \[4, 2\] in .* 'svd' or 'cat'"),
        ({"use_dora": True}, {}, "DoRA's lengths"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, {}, r"biases of LoRA \(.*lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "lm_head.weight"),
        ({"target_modules": ["k_proj"], "trainable_token_indices": [3]}, {}, "trainable_tokens_delta"),
        ({}, {"how": "ties"}, "needs density"),
        ({}, {"density": 0.5}, "density has no effect"),
        ({}, {"how": "cat", "r": 3}, "r is the rank"),
        ({}, {"weights": [1.0]}, "a weight for each of 2 adapters, got 1"),
        ({}, {"weights": [1.0, float("nan")]}, "finite weights"),
        ({}, {"how": "best"}, "how must be one of linear, cat"),
    ],
)
def test_what_cannot_be_combined_is_named(
    second: dict[str, Any], settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folders = [write(tmp_path / "0"), write(tmp_path / "1", **second)]
    with pytest.raises(ValueError, match=named):
        combine_adapters(folders, tmp_path / "made", **settings)
    assert not (tmp_path / "made").exists()


def test_adapters_of_other_bases_are_not_combined_and_a_common_record_is_kept(tmp_path: Path) -> None:
    folders = []
    for number, base in enumerate(("one", "one", "two")):
        model = language_model()
        load_adapter(model, write(tmp_path / "plain", seed=number))
        note(model, base_hash=base, max_length=100 + number, started_from="another")
        folders.append(str(save_adapter(model, tmp_path / str(number), base_model_name="base")))
    with pytest.raises(ValueError, match="weights are others"):
        combine_adapters([folders[0], folders[2]], tmp_path / "made")
    made = combine_adapters(folders[:2], tmp_path / "made")
    assert read_record(made / "adapter_model.safetensors") == TrainedOn(base_hash="one")
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    with pytest.raises(ValueError, match="is one of the adapters"):
        combine_adapters(folders[:2], folders[0])


@pytest.mark.parametrize("dora", [False, True])
def test_a_compressed_adapter_is_the_best_of_its_rank_and_says_what_is_lost(dora: bool, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [3, 5]}
    settings = {"rank_pattern": {"down_proj": 1}, "use_dora": dora, **(rows if dora else {})}
    before = read_factors(write(tmp_path / "before", **settings))
    found = compress_adapter(tmp_path / "before", tmp_path / "after", r=2)
    after = read_factors(found.folder)
    lost, whole = 0.0, 0.0
    for name, factors in before.layers.items():
        product = factors.product()
        U, S, Vh = torch.linalg.svd(product)
        best = U[:, :2] * S[:2] @ Vh[:2]
        torch.testing.assert_close(after.layers[name].product(), best, atol=1e-5, rtol=1e-4)
        assert after.layers[name].r == found.ranks[name] == min(2, factors.r)
        error = float((product - after.layers[name].product()).norm() / product.norm())
        assert found.errors[name] == pytest.approx(error, abs=1e-5)
        lost, whole = lost + float((product - best).norm()) ** 2, whole + float(product.norm()) ** 2
    assert found.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5)
    assert after.others.keys() == before.others.keys()
    assert all(torch.equal(after.others[name], tensor) for name, tensor in before.others.items())
    ours = language_model()
    load_adapter(ours, found.folder)
    theirs = peft.PeftModel.from_pretrained(language_model(), str(found.folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_bound_on_the_error_chooses_the_ranks(tmp_path: Path) -> None:
    write(tmp_path / "before", r=8)
    found = compress_adapter(tmp_path / "before", tmp_path / "after", max_error=0.5)
    assert 1 < max(found.ranks.values()) < 8
    assert max(found.errors.values()) <= 0.5
    for name, factors in read_factors(tmp_path / "before").layers.items():
        values = torch.linalg.svdvals(factors.product())
        assert float(values[found.ranks[name] - 1 :].norm() / values.norm()) > 0.5, "no lower rank would do"
    with pytest.raises(ValueError, match=r"give r, .*or max_error"):
        compress_adapter(tmp_path / "before", tmp_path / "after", r=2, max_error=0.5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank_pattern": {"experts.down_proj": 2}}, "has rank_pattern for the parameters .*experts.down_proj"),
        ({"alpha_pattern": {"gate_up_proj": 2}}, "has alpha_pattern for the parameters .*experts.gate_up_proj"),
        ({"target_parameters": ["experts.down_proj"]}, "are on different parameters"),
    ],
)
def test_experts_that_a_file_does_not_tell_apart_are_named(fields: Any, named: str, tmp_path: Path) -> None:
    folders = []
    for number, more in enumerate(({}, fields)):
        model = language_model("Mixtral", num_local_experts=4)
        both = ["experts.gate_up_proj", "experts.down_proj"]
        inject_lora(model, LoRAConfig(**{"target_modules": [], "target_parameters": both, "r": 4, **more}))
        folders.append(save_adapter(model, tmp_path / str(number)))
    with pytest.raises(ValueError, match=named):
        combine_adapters(folders, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_both_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / str(n), seed=n) for n in range(2)]
    lit_lora(
        "combine", *folders, "--output", tmp_path / "made", "--weights", 0.7, 0.3, "--how", "ties", "--density", 0.5
    )
    expected = combine_adapters(folders, tmp_path / "expected", weights=[0.7, 0.3], how="ties", density=0.5)
    made = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert all(torch.equal(made[n], tensor) for n, tensor in load_file(expected / "adapter_model.safetensors").items())
    lit_lora("compress", tmp_path / "made", "--output", tmp_path / "small", "--r", 1)
    said = capsys.readouterr().out
    assert "2 adapters combined in" in said
    assert "model.layers.1.self_attn.q_proj     1  0." in said
