"""Oracles 2 to 7 of methods/tinyfusion.md; 1 is in test_patterns, 8 in tests/distillation/test_features."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.sd3 import SD3Config
from edit.denoiser import Denoiser
from edit.measuring.cost import macs
from edit.pruning.depth import DepthPruning
from edit.pruning.importance import starts
from edit.pruning.patterns import options
from edit.pruning.tinyfusion import MASK, Gates, TinyFusion
from edit.stream import Condition
from edit.tuning.lora import LoRA


@pytest.fixture
def make(make_dit) -> Callable[..., Denoiser]:
    """The same random weights every time."""

    def made(**options) -> Denoiser:
        torch.manual_seed(0)
        return make_dit(**options)

    return made


@pytest.fixture
def stock_family() -> Callable[[str], tuple[Callable[[], Denoiser], tuple]]:
    """A way to make a tiny random model of a family, the same every time, and inputs for two samples."""
    text = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
    small = {"attention_head_dim": 16, "num_attention_heads": 2}
    configs = {
        "flux": FluxConfig(
            in_channels=16, num_layers=3, num_single_layers=4, axes_dims_rope=(4, 6, 6), **small, **text
        ),
        "sd3": SD3Config(in_channels=4, num_layers=5, sample_size=8, pos_embed_max_size=8, **small, **text),
        "pixart": PixArtConfig(num_layers=4, sample_size=8, cross_attention_dim=32, caption_channels=24, **small),
    }

    def of(family: str):
        def made() -> Denoiser:
            torch.manual_seed(0)
            denoiser = configs[family].build()
            randomise(denoiser, 0)
            return denoiser.eval()

        told = {"text": torch.randn(2, 5, 24)}
        told |= (
            {"text_mask": torch.ones(2, 5, dtype=torch.bool)} if family == "pixart" else {"pooled": torch.randn(2, 20)}
        )
        return made, (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), Condition(**told))

    return of


def gates_of(denoiser: Denoiser) -> Gates:
    own = denoiser.edits["tinyfusion"]
    assert isinstance(own, Gates)
    return own


def searched(denoiser: Denoiser, pattern="1:2", **options) -> Denoiser:
    return edit.apply(denoiser, {"tinyfusion": TinyFusion(pattern, **options)}).train()


def fixed(gates: Gates, mask: Tensor, monkeypatch) -> None:
    """Let every pass draw this: b units."""
    monkeypatch.setattr(Gates, "draw", lambda self, count: mask)


def assembled(make, units: list[int], **options) -> Denoiser:
    return edit.apply(make(**options), {"depth": DepthPruning(pattern="listed", units=tuple(units))})


# ---- 2: the sampling law ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [4.0, 1.0, 0.1])
def test_the_gradient_of_a_draw_is_the_softmax_s_over_tau(tau):
    """d m_i / d l_j = kappa / tau sum_c O_ci y_c (1[c = j] - y_j), y = softmax((kappa l + G) / tau)."""
    gates = Gates(((1, 2), (2, 3)), 0.02, 10.0, tau)
    logits = gates.logits.detach()
    torch.manual_seed(1)
    gumbel = -torch.empty(1, *logits.shape).exponential_().log()[0]
    y = ((10 * logits.masked_fill(~gates.exists, -torch.inf) + gumbel).double() / tau).softmax(1)
    wanted = torch.zeros(5, *logits.shape, dtype=torch.float64)
    for i, (g, place) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]):
        keeps = gates.options[g, :, place].double()
        wanted[i, g] = 10 / tau * (y[g] * keeps - y[g] * (y[g] * keeps).sum())
    torch.manual_seed(1)
    masks = gates.draw(1)[0]
    for i in range(5):
        (found,) = torch.autograd.grad(masks[i], gates.logits, retain_graph=True)
        torch.testing.assert_close(found.double(), wanted[i], rtol=1e-4, atol=1e-5)  # fp32


@pytest.mark.parametrize("tau", [4.0, 1.0, 0.1])
def test_draws_follow_the_softmax_of_the_logits_whatever_the_temperature(tau):
    gates = Gates(((2, 4),), 0.02, 100.0, tau)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([[2.0, 3.0, 0.0, 1.0, 2.0, 2.0]]) / 100)
        masks = gates.draw(200_000).round().long()
    ways = gates.options[0].long()
    found = torch.stack([(masks == way).all(1).float().mean() for way in ways])
    # 2e5 draws: the standard deviation of a frequency is at most 0.0011
    wanted = torch.tensor([0.161, 0.437, 0.022, 0.059, 0.161, 0.161])
    assert torch.allclose(found, wanted, atol=0.005)
    assert torch.allclose(gates.probabilities()[0], wanted, atol=0.001)


def test_the_temperature_and_kappa_go_linearly_over_the_run(make):
    dit = searched(make(depth=4), kappa=(50.0, 100.0))
    own, rule = gates_of(dit), dit.applied["tinyfusion"]
    rule.advance(0.5, own)
    # 4 to 0.1 and 50 to 100, half way; fp32 buffers
    assert own.tau.item() == pytest.approx(2.05) and own.kappa.item() == pytest.approx(75.0)


# ---- 3: forward equivalence ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masks_of_a_batch_give_each_sample_the_network_of_its_kept_units(make, batch, monkeypatch):
    x, t, condition = batch
    gated = searched(make(depth=4))
    kept = [[0, 2], [0, 3], [1, 2], [1, 3]]
    mask = torch.zeros(4, 4)
    for row, units in enumerate(kept):
        mask[row, units] = 1
    fixed(gates_of(gated), mask, monkeypatch)
    out = gated(x, t, condition).sample
    for row, units in enumerate(kept):
        alone = assembled(make, units, depth=4)(
            x[row : row + 1], t[row : row + 1], condition.map(lambda v, r=row: v[r : r + 1])
        )
        assert torch.allclose(out[row : row + 1], alone.sample, atol=1e-6)


@torch.no_grad()
def test_keeping_all_is_the_dense_model(make, batch):
    gated = searched(make(depth=4), "2:2")
    assert torch.equal(gated(*batch).sample, make(depth=4)(*batch).sample)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, groups, kept",
    [
        ("flux", ((1, 2), (1, 1), (1, 2), (1, 2)), [1, 2, 3, 6]),  # 3 double units, 4 single ones
        ("sd3", ((1, 2), (1, 2), (1, 1)), [0, 3, 4]),  # the last unit puts out no text
        ("pixart", ((1, 2), (1, 2)), [1, 2]),
    ],
)
def test_image_and_text_share_a_gate_and_what_is_left_is_a_stock_model(
    stock_family, family, groups, kept, monkeypatch, tmp_path
):
    import diffusers

    make, inputs = stock_family(family)
    gated = searched(make())
    own = gates_of(gated)
    assert own.groups == groups
    mask = torch.zeros(2, len(gated.units))
    mask[:, kept] = 1
    with monkeypatch.context() as patch:
        fixed(own, mask, patch)
        mixed = gated(*inputs).sample
    shallow = edit.apply(make(), {"depth": DepthPruning(pattern="listed", units=tuple(kept))})
    wanted = shallow(*inputs).sample
    assert torch.allclose(mixed, wanted, atol=1e-6 * float(wanted.abs().max()))  # fp32, weights of 1 - 1e-7
    for g, (start, (n, m)) in enumerate(zip(starts(groups), groups, strict=True)):
        way = options(n, m).tolist().index([float(start + i in kept) for i in range(m)])
        own.logits[g, way] += 1.0
    assert torch.equal(edit.fold(gated.eval())(*inputs).sample, wanted)
    edit.save(gated, tmp_path / "a")
    stock = getattr(diffusers, type(make()).stock).from_pretrained(tmp_path / "a")
    assert all(torch.equal(v, gated.model.state_dict()[k]) for k, v in stock.state_dict().items())


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_a_search_runs_in_bf16_whatever_type_a_unit_hands_on(stock_family, family):
    make, inputs = stock_family(family)
    gated = searched(make())
    for checkpointing in (False, True):
        gated.gradient_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            gated(*inputs).sample.float().square().sum().backward()
        assert gates_of(gated).logits.grad.isfinite().all()


def test_units_without_a_decision_are_not_run(make, batch):
    gated = searched(make(depth=4)).eval()
    stream = gated.embed(**gated.pack(*batch))
    with pytest.raises(RuntimeError, match="call that"):
        gated.run(stream)


@torch.no_grad()
def test_outside_of_training_dropped_units_are_not_run(make, batch):
    gated = searched(make(depth=4)).eval()
    with torch.no_grad():
        gates_of(gated).logits.copy_(torch.tensor([[0.0, 0.1], [0.1, 0.0]]))
    shallow = assembled(make, [1, 2], depth=4)
    assert gates_of(gated).kept() == [1, 2]
    assert torch.equal(gated(*batch).sample, shallow(*batch).sample)
    assert macs(gated) == macs(shallow) < macs(make(depth=4))


# ---- 4: gradients ----------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_gate_is_what_its_unit_changes_along_the_output_gradient(make, batch, monkeypatch):
    x, t, condition = batch
    gated = searched(make(depth=4), frozen=True)
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(4, 1).requires_grad_()
    fixed(gates_of(gated), mask, monkeypatch)
    seen = {}
    for i, unit in enumerate(gated.units):

        def wrapped(stream, unit=unit, i=i):
            after = unit(stream)
            inner = unit.unit(stream)
            after.image.retain_grad()
            seen[i] = (after.image, (inner.image - stream.image).detach())
            return after

        gated.units[i] = wrapped
    gated(x, t, condition).sample.square().sum().backward()
    for i, (after, change) in seen.items():
        wanted = (after.grad * change).sum((1, 2))
        assert torch.allclose(mask.grad[:, i], wanted, rtol=1e-4, atol=1e-6)  # fp32 sums of 512 products


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4"])
def test_every_logit_gets_a_gradient_and_frozen_weights_none(make, batch, pattern):
    gated = searched(make(depth=4), pattern, frozen=True)
    for name, p in gated.named_parameters():
        p.requires_grad_(edit.edits.trains(gated, name))
    out = gated(*batch)
    out.sample.square().sum().backward()
    grad = gates_of(gated).logits.grad
    assert grad.isfinite().all() and (grad != 0).all()
    assert all(p.grad is None for n, p in gated.named_parameters() if not n.startswith("edits."))


@pytest.mark.parametrize("update", ["none", "lora", "full"])
def test_what_is_trained_beside_the_logits(make, batch, update):
    gated = make(depth=4)
    if update == "lora":
        edit.apply(gated, {"lora": LoRA(rank=2, alpha=4, targets=("all-linear",))})
    searched(gated, frozen=update == "none")
    trained = {n for n, _ in gated.named_parameters() if edit.edits.trains(gated, n)}
    assert "edits.tinyfusion.logits" in trained
    rest = {n for n, _ in gated.named_parameters()} - {"edits.tinyfusion.logits"}
    kept = {"none": set(), "lora": {n for n in rest if ".lora_" in n}, "full": rest}[update]
    assert trained - {"edits.tinyfusion.logits"} == kept


def test_seven_of_fourteen_are_drawn_and_reach_every_way():
    gates = Gates(((7, 14), (7, 14)), 0.02, 100.0, 4.0)
    masks = gates.draw(64)
    assert masks.shape == (64, 28) and gates.logits.shape == (2, 3432)
    assert torch.allclose(masks.unflatten(1, (2, 14)).sum(2), torch.tensor(7.0), atol=1e-4)  # weights of 1 - 1e-7
    (masks * torch.randn(28)).sum().backward()
    assert (gates.logits.grad != 0).all()


def test_gradient_checkpointing_draws_the_same_units_again(make, batch):
    grads = []
    for checkpointing in (False, True):
        gated = searched(make(depth=4))
        gated.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        gated(*batch).sample.square().sum().backward()
        grads.append(gates_of(gated).logits.grad)
    assert torch.equal(*grads)


def test_groups_of_different_size_never_choose_what_is_not_there(make, batch):
    gated = searched(make(depth=7), ((1, 4), (2, 3)))
    masks = gated(*batch).trace[MASK].round()
    assert (masks[:, :4].sum(1) == 1).all() and (masks[:, 4:].sum(1) == 2).all()
    assert gates_of(gated).draw(500).round()[:, :4].sum(0).min() > 50  # each of 4 ways about 125 times


# ---- 5: recoverability -----------------------------------------------------------------------------------------------


class Repairable(nn.Module):
    """x + (W + B A) x or x + W x: unit A of the toy, zero at first, which an update can repair."""

    def __init__(self, update: str, rank: int = 4, d: int = 8):
        super().__init__()
        if update == "full":
            self.w = nn.Parameter(torch.zeros(d, d))
        self.a = nn.Parameter(torch.randn(rank, d) / d**0.5) if update == "lora" else None
        self.b = nn.Parameter(torch.zeros(d, rank)) if update == "lora" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.a is not None:
            return x + 2 * x @ self.a.T @ self.b.T
        return x + x @ self.w.T if hasattr(self, "w") else x


def probability_of_the_repairable(update: str, lr: float, seed: int, steps: int = 1500) -> float:
    """A 1:2 search between unit A (relative loss 1, repairable) and unit B (relative loss 0.5, fixed)."""
    torch.manual_seed(seed)
    d = 8
    wanted = torch.randn(d, 4) @ torch.randn(4, d) / d  # of rank 4, within reach of the LoRA
    repairable, gates = Repairable(update), Gates(((1, 2),), 0.02, 100.0, 4.0)
    groups = [{"params": gates.parameters(), "lr": 1e-3}]
    if weights := list(repairable.parameters()):
        groups.append({"params": weights, "lr": lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    part = 1 - 0.5**0.5  # of the way to the target: leaves half of the squared distance
    for step in range(steps):
        gates.tau.fill_(4 - 3.9 * step / steps)
        x = torch.randn(64, d)
        target = x @ wanted.T
        mask = gates.draw(64)
        out = mask[:, :1] * (repairable(x) - x) + mask[:, 1:] * part * target
        loss = (out - target).square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gates.probabilities()[0, 0].item()


@pytest.mark.parametrize(
    "update, lr, chosen",
    [("none", 0.0, False), ("lora", 1e-2, True), ("full", 1e-2, True), ("lora", 1e-3, False), ("full", 1e-3, False)],
)
def test_the_search_prefers_what_an_update_can_repair_unless_the_update_is_too_slow(update, lr, chosen):
    p = probability_of_the_repairable(update, lr, seed=0)
    assert p > 0.99 if chosen else p < 0.01


# ---- 6: identities ---------------------------------------------------------------------------------------------------


def test_units_that_do_nothing_are_dropped():
    torch.manual_seed(0)
    config = DiTConfig(input_size=4, in_channels=1, patch_size=2, hidden_size=16, depth=4, num_heads=2, num_classes=4)
    teacher = config.build()
    randomise(teacher, 0)
    for i in (0, 2):  # adaLN-zero: gates of zero make a unit the identity
        nn.init.zeros_(teacher.units[i].adaLN_modulation[1].weight)
        nn.init.zeros_(teacher.units[i].adaLN_modulation[1].bias)
    gated = config.build()
    gated.load_state_dict(teacher.state_dict())
    searched(gated, "2:4", frozen=True)
    gates = gates_of(gated)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(200):
        gates.tau.fill_(4 - 3.9 * step / 200)
        x, t, label = torch.randn(16, 1, 4, 4), torch.rand(16), Condition(label=torch.randint(0, 4, (16,)))
        with torch.no_grad():
            target = teacher(x, t, label).sample
        loss = (gated(x, t, label).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gates.kept() == [1, 3] and gates.probabilities().max() > 0.95


# ---- 7: numbers of parameters; extraction is in tests/recipes/test_prune ---------------------------------------------


def test_the_lora_of_the_search_has_the_published_size():
    with torch.device("meta"):
        dit = DiTConfig(
            depth=28, hidden_size=1152, num_heads=16, patch_size=2, input_size=32, learn_sigma=True, time="ddpm"
        ).build()
        edit.apply(dit, {"lora": LoRA(rank=8, alpha=16, targets=("all-linear",)), "tinyfusion": TinyFusion()})
    own = sum(p.numel() for n, p in dit.named_parameters() if ".lora_" in n)
    whole = sum(p.numel() for n, p in dit.named_parameters() if ".lora_" not in n and not n.startswith("edits."))
    assert own == 6_001_920
    assert own / whole == pytest.approx(0.00889, abs=1e-5)


def test_half_of_dit_xl_has_340_million_parameters():
    with torch.device("meta"):
        dit = DiTConfig(
            depth=28, hidden_size=1152, num_heads=16, patch_size=2, input_size=32, learn_sigma=True, time="ddpm"
        ).build()
        edit.apply(dit, {"tinyfusion": TinyFusion()})
        edit.fold(dit)
    assert len(dit.units) == 14
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(340e6, rel=2e-3)


# ---- as an edit ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_search_comes_back_from_its_artifact_with_its_decision(make, batch, tmp_path):
    dit = make(depth=4)
    edit.apply(dit, {"lora": LoRA(2, 4, targets=("all-linear",)), "tinyfusion": TinyFusion("2:4")}).eval()
    gates_of(dit).logits[0, 4] += 0.1
    edit.save(dit, tmp_path / "a")
    back = edit.load(tmp_path / "a").denoiser
    assert gates_of(back).kept() == gates_of(dit).kept() == [1, 3]
    assert torch.equal(back(*batch).sample, dit(*batch).sample)


@torch.no_grad()
def test_folding_drops_the_units_that_lost(make, batch):
    dit = searched(make(depth=4)).eval()
    gates_of(dit).logits[:, 1] += 0.1
    before = dit(*batch).sample
    edit.fold(dit)
    assert dit.config["depth"] == 2 and not dit.applied
    assert torch.equal(dit(*batch).sample, before)


def test_the_decision_follows_the_logits(make, batch):
    dit = searched(make(depth=2)).eval()
    with torch.no_grad():
        for way, kept in ((0, [0]), (1, [1])):
            gates_of(dit).logits.copy_(torch.eye(2)[way])
            shallow = assembled(make, kept, depth=2)
            assert torch.equal(dit(*batch).sample, shallow(*batch).sample)


def test_confidence_of_every_group_is_there_to_be_logged(make, batch):
    dit = searched(make(depth=4))
    logged = dit.applied["tinyfusion"].metrics(dit(*batch).trace)
    assert logged["confidence"].tolist() == [0.5, 0.5]
    assert {"confidence/0", "confidence/1", "choice/0", "choice/1"} <= set(logged)
    assert dit.applied["tinyfusion"].metrics(dit.eval()(*batch).trace) == {}


def test_pruning_under_a_search_is_refused(make):
    with pytest.raises(ValueError, match="search over these units is under way"):
        edit.apply(searched(make(depth=4)), {"depth": DepthPruning()})


def test_a_pruned_model_can_be_searched_again(make, batch):
    dit = assembled(make, [0, 1, 3, 4], depth=6)
    searched(dit, "1:2").eval()
    assert dit(*batch).sample.shape == batch[0].shape and len(gates_of(dit).kept()) == 2


@pytest.mark.parametrize("options, complaint", [({"tau": (4.0, 0.0)}, "positive"), ({"kappa": (0.0, 1.0)}, "positive")])
def test_impossible_schedules_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        TinyFusion(**options)


def test_units_are_searched_where_nothing_is_allocated():
    with torch.device("meta"):
        flux = FluxConfig().build()
        edit.apply(flux, {"tinyfusion": TinyFusion()}, fresh=False)
        assert len(gates_of(flux).kept()) == 10 + 19
