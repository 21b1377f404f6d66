"""Every module kind that PEFT adapts: convolutions, experts, tied and checkpointed modules, quantised bases."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankscope as rs


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def gradients(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Autograd's, of the mean over batches of one size."""
    model.eval().requires_grad_(True).zero_grad()
    for batch in batches:
        (loss_fn(model, batch) / len(batches)).backward()
    return {name: m.weight.grad.flatten(1) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def check(model: nn.Module, batches: list[torch.Tensor], targets: tuple[rs.TargetModule, ...]) -> rs.Profile:
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    for name, gradient in gradients(model, batches).items():
        if name in found.spectra():
            exact = torch.linalg.svdvals(gradient)[:4]
            values = torch.tensor(found.spectra(signal=False)[name][: len(exact)]).float()
            torch.testing.assert_close(values, exact, rtol=1e-3, atol=1e-6, msg=name)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": 2, "padding_mode": "reflect"}],
    ids=str,
)
def test_convolutions(options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, **options), nn.Tanh(), nn.Conv2d(5, 4, (2, 3)))
    batches = [torch.randn(2, 3, 9, 9) for _ in range(3)]
    found = check(model, batches, rs.find_targets(model, ["0", "2"]))
    assert found.table["in_features"].tolist() == [27, 30]


class Experts(nn.Module):
    """Each row goes to one of three experts; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0).long() == index).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]).tanh())
        return out


def test_experts_count_the_rows_they_get() -> None:
    torch.manual_seed(0)
    model = Experts()
    found = check(model, [torch.randn(10, 6) for _ in range(4)], rs.find_targets(model))
    norms = found.column("gradient_norm")
    assert norms["experts.0"] > 0 < norms["experts.1"]
    assert norms["experts.2"] == 0


class Tied(nn.Module):
    """Two modules of one weight, which two adapters may adapt differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def test_tied_modules_have_a_gradient_each() -> None:
    torch.manual_seed(0)
    model = Tied()
    batches = [torch.randn(5, 6) for _ in range(3)]
    targets = rs.find_targets(model, ["first", "second"])
    assert len(targets) == 2
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    untied = Tied()
    untied.load_state_dict(model.state_dict())
    untied.second.weight = nn.Parameter(model.first.weight.detach().clone())
    apart = rs.profile(untied, batches, targets=targets, loss_fn=loss_fn)
    for name in ("first", "second"):
        assert found.spectra()[name] == pytest.approx(apart.spectra()[name], rel=1e-4)


class Checkpointed(nn.Module):
    """One module called twice, in two checkpointed segments."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant)
    batches = [torch.randn(1, 6) for _ in range(6)]
    found = check(model, batches, rs.find_targets(model))
    each = torch.stack([gradients(model, [batch])["inner"].flatten() for batch in batches])
    assert found.column("fisher_trace")["inner"] == pytest.approx(float(each.square().sum(1).mean()), rel=1e-4)


class Mixed(nn.Module):
    """q, k and v read one tensor; the fourth module another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x).tanh() * self.k(x).sigmoid() + self.v(x))


def test_modules_that_read_one_tensor_have_equal_inputs() -> None:
    torch.manual_seed(0)
    model = Mixed()
    batches = [torch.randn(7, 6) for _ in range(3)]
    found = rs.profile(model, batches, loss_fn=loss_fn, targets=rs.find_targets(model, ["q", "k", "v", "o"]))
    moments = found.column("activation_moment")
    assert moments["q"] == moments["k"] == moments["v"] != moments["o"]
    assert moments["q"] == pytest.approx(float(torch.cat(batches).square().sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bases_are_near_full_precision(bits: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()) for _ in range(3)))
    batches = [torch.randn(16, 64) for _ in range(4)]
    targets = rs.find_targets(model)
    full = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    for block in model:
        weight = block[0].weight.data
        if bits == 8:
            block[0] = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            block[0].weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            block[0] = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            block[0].weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    model.to("cpu")  # quantises
    assert rs.find_targets(model) == targets
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    for column, tolerance in (("gradient_norm", 0.1), ("weight_norm", 0.05), ("sensitivity", 0.15)):
        assert found.table[column].tolist() == pytest.approx(full.table[column].tolist(), rel=tolerance)


class FusedExperts(nn.Module):
    """As transformers 5 keeps Mixtral's experts: one 3-D weight, here with a fixed route."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) @ self.experts[1]


def test_fused_experts_are_named_skipped_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    found = check(FusedExperts(), [torch.randn(4, 6) for _ in range(3)], rs.find_targets(FusedExperts()))
    assert found.metadata["skipped"] == {"experts": "experts fused into one 3-D weight cannot be profiled"}
    assert "`experts` is left out: experts fused into one 3-D weight cannot be profiled (1 such)" in caplog.text


def test_mixtral_profiles_its_attention_and_names_its_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads, vocab_size=50, pad_token_id=0))
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 50, (3, 2, 7))]
    found = rs.profile(model, batches)
    assert [target.role for target in found.targets] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [name.rsplit(".", 1)[1] for name in found.metadata["skipped"]] == ["gate_up_proj", "down_proj"]


def test_overflow_of_half_precision_is_an_error_that_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).half()
    batches = [torch.ones(2, 4, dtype=torch.float16) for _ in range(2)]
    with pytest.raises(rs.RankscopeError, match=r"gradient at `0` must be finite, but is not; .* float32 or bfloat16"):
        rs.profile(model, batches, loss_fn=lambda m, b: m(b).float().sum() * 1e5)


def test_half_precision_sums_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    batches = [torch.randn(64, 4) for _ in range(2)]

    def loss(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return m(b.to(next(m.parameters()).dtype)).float().sum() * 3e4  # a sum of 64 deltas is beyond float16

    whole, half = rs.profile(model, batches, loss_fn=loss), rs.profile(model.half(), batches, loss_fn=loss)
    assert half.column("gradient_norm") == pytest.approx(whole.column("gradient_norm"), rel=1e-2)
