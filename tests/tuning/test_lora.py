from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

import edit
from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.denoiser import Edit
from edit.edits import trains, without
from edit.routing.elastic import Elastic
from edit.stream import Condition
from edit.tuning.guidance import GuidanceInput
from edit.tuning.lora import LoRA
from recipes import export


def randomise_lora(dit) -> None:
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.1)


@torch.no_grad()
def test_a_layer_computes_w_x_plus_alpha_over_rank_b_a_x(dit):
    weight = dit.units[1].attn.qkv.weight.clone()
    edit.apply(dit, {"lora": LoRA(rank=4, alpha=6.0)})
    randomise_lora(dit)
    layer, x = dit.units[1].attn.qkv, torch.randn(2, 5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 32) and b.shape == (96, 4)
    expected = x @ (weight + 6 / 4 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # fp32, sums in another order
    edit.fold(dit)
    torch.testing.assert_close(dit.units[1].attn.qkv.weight, weight + 6 / 4 * b @ a, rtol=1e-5, atol=1e-6)


def test_only_the_low_rank_factors_are_trainable_and_targets_decide_where(dit):
    edit.apply(dit, {"lora": LoRA(rank=2, targets=("mlp.fc1", "adaLN_modulation.1"))})
    trainable = {n for n, _ in dit.named_parameters() if dit.applied["lora"].trainable(n)}
    where = {n.split(".lora_")[0] for n in trainable}
    wanted = {f"model.blocks.{i}.{name}" for i in range(3) for name in ("mlp.fc1", "adaLN_modulation.1")}
    assert where == wanted | {"model.final_layer.adaLN_modulation.1"} and len(trainable) == 2 * len(where)
    assert not any(LoRA().trainable(n) for n in ("model.blocks.0.attn.qkv.base_layer.weight", "model.pos_embed"))


def test_all_linear_layers_means_all_of_them(dit):
    count = sum(isinstance(m, torch.nn.Linear) for m in dit.model.modules())
    edit.apply(dit, {"lora": LoRA(rank=1, targets="all-linear")})
    assert sum("lora_A" in n for n, _ in dit.named_parameters()) == count


def test_an_artifact_keeps_the_base_under_stock_names_and_the_factors_apart(tmp_path, dit):
    before = {k: v.clone() for k, v in dit.model.state_dict().items()}
    edit.apply(dit, {"lora": LoRA(rank=2)})
    randomise_lora(dit)
    edit.save(dit, tmp_path / "a")
    stock = load_file(tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    assert stock.keys() == before.keys() - {"pos_embed"}
    assert all(torch.equal(stock[k], before[k]) for k in stock)
    own = load_file(tmp_path / "a" / "edits.safetensors")
    assert len(own) == 2 * 2 * 3 and all(".lora_" in k for k in own)


def test_lora_works_where_nothing_is_allocated():
    with torch.device("meta"):
        dit = edit.apply(DiTConfig().build(), {"lora": LoRA(rank=16)}, fresh=False)
    assert all(p.is_meta for p in dit.parameters())
    assert sum(p.numel() for n, p in dit.named_parameters() if ".lora_" in n) == 28 * 16 * (1152 * 4 + 1152 * 2)


def test_dropout_acts_in_training_alone(dit, batch):
    edit.apply(dit, {"lora": LoRA(rank=2, dropout=0.5)})
    randomise_lora(dit)
    with torch.no_grad():
        assert torch.equal(dit(*batch).sample, dit(*batch).sample)
        dit.train()
        assert not torch.equal(dit(*batch).sample, dit(*batch).sample)


def test_without_targets_those_of_the_family_are_adapted_that_a_pruned_model_still_has(make_flux):
    single = edit.apply(make_flux(num_layers=0), {"lora": LoRA(rank=2)})
    assert single.applied["lora"].targets == ("to_q", "to_k", "to_v")


def test_a_fold_in_training_mode_is_the_same_fold(dit):
    edit.apply(dit, {"lora": LoRA(rank=2, dropout=0.5)})
    randomise_lora(dit)
    twin = deepcopy(dit).train()
    for a, b in zip(edit.fold(dit).parameters(), edit.fold(twin).parameters(), strict=True):
        assert torch.equal(a, b)


def test_after_routers_it_would_be_missing_where_they_run_copies_and_is_refused(dit):
    edit.apply(dit, {"elastic": Elastic(router=8)})
    keys = set(dit.state_dict())
    with pytest.raises(ValueError, match=r"lora \(LoRA\) cannot be applied after elastic \(Elastic\).*: put it before"):
        edit.apply(dit, {"lora": LoRA(rank=2)})
    assert set(dit.state_dict()) == keys and list(dit.applied) == ["elastic"]


def test_what_cannot_be_adapted_is_refused(dit):
    with pytest.raises(ValueError, match="LoRA: rank must be at least 1, got 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="no linear layer's name ends in 'to_q'; there are t_embedder.mlp.0"):
        edit.apply(dit, {"lora": LoRA(targets=("attn.qkv", "to_q"))})
    edit.apply(dit, {"lora": LoRA()})
    with pytest.raises(ValueError, match="the model already has one; fold it before adding another"):
        edit.apply(dit, {"second": LoRA()})
    edit.fold(dit)
    edit.apply(dit, {"second": LoRA()})
    assert list(dit.applied) == ["second"]


@dataclass
class Frozen(Edit):
    """An edit that freezes all that was there."""

    def apply(self, denoiser) -> None:
        pass

    def trainable(self, name: str) -> bool:
        return False


@pytest.mark.parametrize("guidance_first", [True, False])
def test_a_new_guidance_input_trains_beside_the_factors_and_both_are_exported(guidance_first, tmp_path):
    flux = FluxConfig(16, 1, 1, 16, 2, 24, 20, guidance_embeds=False, axes_dims_rope=(4, 6, 6)).build()
    edits = {"told": GuidanceInput(), "lora": LoRA(rank=2, targets=("attn.to_q",)), "frozen": Frozen()}
    order = ("told", "lora", "frozen") if guidance_first else ("frozen", "lora", "told")
    edit.apply(flux, {name: edits[name] for name in order})
    for name, p in flux.named_parameters():  # as a recipe decides it
        p.requires_grad_(p.requires_grad and trains(flux, name))
    learning = {n: p for n, p in flux.named_parameters() if p.requires_grad}
    assert {n for n in learning if ".lora_" not in n} == {
        f"model.time_text_embed.guidance_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert sum(".lora_" in n for n in learning) == 4  # A and B in two units
    condition = Condition(text=torch.randn(2, 5, 24), pooled=torch.randn(2, 20), guidance=torch.tensor([1.0, 4.0]))
    batch = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), condition
    with torch.no_grad():
        for p in flux.parameters():
            p.normal_(std=0.2)
    grads = torch.autograd.grad(flux(*batch).sample.square().sum(), list(learning.values()))
    assert all(g.any() for g in grads)
    del flux.applied["frozen"]
    edit.save(flux, tmp_path / "a")
    assert export.main([f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}"]) == 0
    whole = edit.load(tmp_path / "out").denoiser
    assert whole.config["guidance_embeds"] and not whole.applied
    with torch.no_grad():  # fp32: W + B A is rounded once before, the live LoRA adds afterwards
        torch.testing.assert_close(whole(*batch).sample, flux.eval()(*batch).sample, rtol=1e-4, atol=1e-4)
        other = Condition(text=condition.text, pooled=condition.pooled, guidance=condition.guidance + 1)
        assert not torch.allclose(whole(*batch[:2], other).sample, whole(*batch).sample, atol=1e-2)


# ---- the base as the teacher of its own LoRA -------------------------------------------------------------------------


def tied_flux(*targets: str):
    """A tiny flux under a LoRA that does something, trained as a recipe trains it; its base's output; a batch."""
    flux = FluxConfig(16, 1, 2, 16, 2, 24, 20, guidance_embeds=False, axes_dims_rope=(4, 6, 6)).build()
    with torch.no_grad():
        for p in flux.parameters():
            p.normal_(std=0.2)
    condition = Condition(text=torch.randn(2, 5, 24), pooled=torch.randn(2, 20))
    batch = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), condition
    with torch.no_grad():
        base = flux(*batch).sample
    lora = LoRA(rank=2, targets=targets)
    edit.apply(flux, {"lora": lora})
    randomise_lora(flux)
    for name, p in flux.named_parameters():
        p.requires_grad_(lora.trainable(name))
    return flux, base, batch


FLUX_LINEAR = (
    "attn.to_q",
    "attn.to_out.0",
    "attn.add_k_proj",
    "ff.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)


def test_switched_off_a_flux_lora_is_its_base_bit_for_bit_and_leaves_no_graph():
    flux, base, batch = tied_flux(*FLUX_LINEAR)
    with torch.no_grad(), without(flux) as teacher:
        taught = teacher(*batch, taps=(0, 2))
    assert torch.equal(taught.sample, base) and taught.sample.grad_fn is None
    assert all(v.grad_fn is None for v in taught.trace.values())
    assert (flux(*batch).sample - base).abs().max() > 0.01  # and it is on again


def test_distilling_from_its_own_base_trains_the_factors_alone():
    flux, base, batch = tied_flux(*FLUX_LINEAR)
    with torch.no_grad(), without(flux):
        target = flux(*batch).sample
    (flux(*batch).sample - target).square().mean().backward()
    for name, p in flux.named_parameters():
        assert (p.grad is not None and p.grad.any()) if ".lora_" in name else p.grad is None, name


def test_switching_off_ends_with_the_block_and_touches_no_parameter():
    flux, base, batch = tied_flux("attn.to_q")
    before = {n: (p.requires_grad, p.data_ptr()) for n, p in flux.named_parameters()}
    with pytest.raises(RuntimeError, match="on purpose"), without(flux):
        assert before == {n: (p.requires_grad, p.data_ptr()) for n, p in flux.named_parameters()}
        raise RuntimeError("on purpose")
    assert not torch.equal(flux(*batch).sample, base)
    assert before == {n: (p.requires_grad, p.data_ptr()) for n, p in flux.named_parameters()}


@torch.no_grad()
def test_branches_of_a_single_unit_add_up_under_a_lora():
    flux, _, batch = tied_flux("proj_out", "proj_mlp")
    whole = flux(*batch).sample
    torch.testing.assert_close(flux(*batch, branches=(1, 2)).sample, whole, rtol=1e-4, atol=1e-5)  # fp32, split sums


def test_a_model_without_lora_has_nothing_to_switch_off(dit):
    with pytest.raises(ValueError, match="this dit has no edit that could be switched off"), without(dit):
        pass


def _factors_with_gradients(rank_count: int) -> list[int]:
    import os

    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=rank_count)
    torch.manual_seed(0)
    flux, _, batch = tied_flux(*FLUX_LINEAR)
    for unit in flux.units:
        fully_shard(unit)
    fully_shard(flux)
    with torch.no_grad(), without(flux):  # the very first forward, as in a recipe's step
        target = flux(*batch).sample
    (flux(*batch).sample - target).square().mean().backward()
    dist.destroy_process_group()
    return [sum(p.grad is not None for p in flux.parameters()), sum(".lora_" in n for n, _ in flux.named_parameters())]


def test_a_sharded_model_that_taught_first_still_learns():
    for with_gradient, factors in run_ranks(_factors_with_gradients, args=(2,)):
        assert with_gradient == factors > 0
