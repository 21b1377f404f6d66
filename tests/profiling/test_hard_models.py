"""Models and losses that are not tame: each profile is that of autograd's own gradient, or one clear line."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.profiling import GradientHooks, RandomMatrices
from rankscope.profiling.sketch import InputSketch
from rankscope.targets import base_modules


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def rows(n: int = 3, size: int = 4, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, width, generator=generator) for _ in range(n)]


def check(
    model: nn.Module, batches: list[Any], loss_fn: Callable[..., torch.Tensor] = mean_square, rel: float = 1e-4
) -> rs.Profile:
    """The profile, whose norms are those of gradients by autograd, of the mean over batches of one size."""
    found = rs.profile(model, batches, loss_fn=loss_fn)
    assert not [m for m in model.modules() if m._forward_hooks]
    model.eval().requires_grad_(True).zero_grad()
    for batch in batches:
        (loss_fn(model, batch) / len(batches)).backward()
    present = dict(base_modules(model))
    for name, norm in found.column("gradient_norm").items():
        assert norm == pytest.approx(float(present[name].weight.grad.norm()), rel=rel), name
    return found


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        q /= 2.0
        q[:, 0].mul_(3.0)
        return self.o(q)


class Pair(nn.Linear):
    """A linear module that returns its output and its bias, as in Megatron."""

    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(x, self.weight), self.bias


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Pair(6, 6), Pair(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (self.first, self.last):
            output, bias = module(x)
            output.relu_()
            x = output + bias
        return x


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.inner(input=x).abs().mean()
        return self.inner(input=x) / scale


IN_PLACE = {
    "halved": Halved,
    "relu": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)),
    "silu": lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(inplace=True), nn.Dropout(0.1, inplace=True), nn.Linear(6, 1)),
    "pairs": OfPairs,
    "under no_grad, then with": ByKeyword,
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("tokens", [0, 3])
def test_outputs_that_change_in_place_have_their_own_gradient(kind: str, tokens: int) -> None:
    """Of rows, and of sequences, whose outputs are views."""
    torch.manual_seed(0)
    batches = rows() if not tokens else [batch.view(4, tokens, -1) for batch in rows(3, 4, 6 * tokens)]
    check(IN_PLACE[kind](), batches)


def test_convolutions_before_changes_in_place_and_without_a_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1, 8, 8, generator=generator) for _ in range(3)]  # (C, H, W)
    found = rs.profile(model, batches, targets=rs.find_targets(model, ["0", "2"]), loss_fn=mean_square)
    batched = rs.profile(
        model, [b[None] for b in batches], targets=rs.find_targets(model, ["0", "2"]), loss_fn=mean_square
    )
    assert found.column("gradient_norm") == pytest.approx(batched.column("gradient_norm"))


class SpoilsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        out = self.first(x)
        x.zero_()
        return out


def test_inputs_that_change_in_place_are_named() -> None:
    message = "the input of `first` must stay as it was until the backward pass, but was changed in place; change it out of place."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.profile(SpoilsItsInput(), rows(), loss_fn=mean_square)


class NeverCalled(nn.Module):
    """One module's weight is read without a call, one is called under no_grad only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.read, self.quiet = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.quiet(x)
        return nn.functional.linear(self.second(self.first(x).tanh()), self.read.weight)


def test_modules_without_a_call_are_recorded_and_get_nothing() -> None:
    torch.manual_seed(0)
    model = NeverCalled()
    targets = tuple(
        rs.TargetModule(name=n, in_features=6, out_features=6) for n in ("first", "second", "read", "quiet")
    )
    found = rs.profile(model, rows(), targets=targets, loss_fn=mean_square)
    assert found.metadata["without_gradient"] == ["read", "quiet"]
    assert found.spectra()["read"].tolist() == [0.0] * 6
    for strategy in ("one-shot", "gradient-norm", "activation"):
        budget = rs.ParameterBudget.uniform(targets, 2)
        ranks = rs.allocate(strategy, targets=targets, budget=budget, profile=found).ranks
        assert ranks["read"] <= ranks["first"]


# --- wrapped models ------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("how", ["block by block", "in place", "blocks in place", "called before"])
def test_compiled_models_have_the_profile_of_plain_ones(how: str) -> None:
    torch.manual_seed(0)
    model = Blocks()
    plain = rs.profile(model, rows(), loss_fn=mean_square)
    compiled = copy.deepcopy(model)
    if how == "block by block":
        for i, layer in enumerate(compiled.layers):
            compiled.layers[i] = torch.compile(layer, backend="eager")
    elif how == "blocks in place":
        for layer in compiled.layers:
            layer.compile(backend="eager")
    else:
        compiled.compile(backend="eager")
    if how == "called before":
        compiled(rows()[0])
    found = rs.profile(compiled, rows(), loss_fn=mean_square)
    assert found.column("gradient_norm") == plain.column("gradient_norm")


def test_a_model_can_be_copied_and_saved_while_it_is_observed() -> None:
    model = Blocks()
    targets = rs.find_targets(model)
    watched = GradientHooks({t: model.get_submodule(t.name) for t in targets}, RandomMatrices(k=4, seed=0))
    with watched.hooked():
        watched.begin_batch(1.0)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for copied in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            copied(rows()[0]).sum().backward()
        watched.end_batch()
        assert not any(sums.batches for sums in watched.accumulators.values())
        watched.begin_batch(1.0)
        model(rows()[0]).sum().backward()
        watched.end_batch()
        assert all(sums.batches == 1 for sums in watched.accumulators.values())


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_models_have_the_profile_of_loaded_ones(offload: str, tmp_path: Any) -> None:
    from accelerate import cpu_offload, disk_offload

    torch.manual_seed(0)
    model = Blocks()
    plain = rs.profile(model, rows(), loss_fn=mean_square)
    away = copy.deepcopy(model)
    if offload == "cpu":
        cpu_offload(away, torch.device("cpu"))
    else:
        disk_offload(away, tmp_path, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in away.parameters())
    found = rs.profile(away, rows(), loss_fn=mean_square)
    assert found.metadata["weights"] == plain.metadata["weights"]
    for column in ("gradient_norm", "sensitivity", "weight_norm", "activation_variance"):
        assert found.column(column) == pytest.approx(plain.column(column))


def test_a_callers_no_grad_does_not_matter() -> None:
    model = Blocks()
    with torch.no_grad():
        found = rs.profile(model, rows(), loss_fn=mean_square)
        assert not torch.is_grad_enabled()
    assert found.column("gradient_norm") == rs.profile(model, rows(), loss_fn=mean_square).column("gradient_norm")


def test_models_made_in_inference_mode_are_named() -> None:
    with torch.inference_mode():
        model = Blocks()
    message = (
        "the model's weights must take part in a backward pass, but `layers.0.0.weight` was made in torch.inference_mode; "
        "load the model outside it."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.profile(model, rows(), loss_fn=mean_square)


def test_models_without_weights_are_named() -> None:
    with torch.device("meta"):
        model = Blocks()
    message = "the model's weights must be loaded, but `layers.0.0.weight` is on the meta device; load them first."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.profile(model, rows(), loss_fn=mean_square)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e25), (torch.float32, 1e-25), (torch.float64, 1e-100), (torch.float64, 1e120)],
)
@pytest.mark.parametrize("sketched", [False, True])
def test_gradients_of_any_size(dtype: torch.dtype, factor: float, sketched: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).to(dtype)
    batches = [batch.to(dtype) for batch in rows(6, 5, 40)]
    size = 2 if sketched else 40
    plain = rs.profile(model, batches, loss_fn=mean_square, sketch_size=size)
    found = rs.profile(model, batches, loss_fn=lambda m, b: mean_square(m, b) * factor, sketch_size=size)
    assert plain.table["exact"].tolist() == [not sketched] * 2
    for column, power in (("gradient_norm", 1), ("sensitivity", 1), ("fisher_trace", 2), ("noise_energy", 2)):
        expected = {name: value * factor**power for name, value in plain.column(column).items()}
        assert found.column(column) == pytest.approx(expected, rel=1e-4, abs=0)
    for name, values in plain.spectra().items():
        assert found.spectra()[name] == pytest.approx(values * factor, rel=1e-4, abs=1e-6 * factor * values[0])
    budget = rs.ParameterBudget.uniform(plain.targets, 3)
    both = [rs.allocate("one-shot", targets=plain.targets, budget=budget, profile=p) for p in (plain, found)]
    assert both[0] == both[1]


@pytest.mark.parametrize("where", [0, 2, 5])
def test_empty_batches_change_nothing(where: int) -> None:
    torch.manual_seed(0)
    model, batches = Blocks(), rows(5)
    total = lambda m, b: m(b).square().sum() / 4  # noqa: E731
    plain = rs.profile(model, batches, loss_fn=total)
    found = rs.profile(model, [*batches[:where], torch.zeros(0, 6), *batches[where:]], loss_fn=total)
    assert found.column("fisher_trace") == pytest.approx(plain.column("fisher_trace"))
    assert found.metadata["batches"] == 5


def test_modules_of_no_width_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    targets = (*rs.find_targets(model), rs.TargetModule(name="none", in_features=6, out_features=0))
    found = rs.profile(model, rows(), targets=targets, loss_fn=mean_square)
    assert found.metadata["skipped"] == {"none": "modules without inputs or outputs have no rank"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch_size": 0}, "`sketch_size`: input should be greater than or equal to 2, but got 0."),
        ({"sketch_size": 1}, "`sketch_size`: input should be greater than or equal to 2, but got 1."),
        ({"sketch_size": 8.5}, "`sketch_size`: input should be a valid integer, but got 8.5."),
        ({"budget": "100"}, "`budget` must be ParameterBudget | int | None, but got '100'; see `help(rankscope.profile)`."),
        ({"n_batches": -1}, "`n_batches`: input should be greater than or equal to 2, but got -1."),
        ({"head_steps": -1}, "`head_steps`: input should be greater than or equal to 0, but got -1."),
        ({"keep_directions": -1}, "`keep_directions`: input should be greater than or equal to 0, but got -1."),
        ({"max_skipped": 1.5}, "`max_skipped`: input should be less than or equal to 1, but got 1.5."),
        ({"tolerance": float("nan")}, "`tolerance`: input should be a finite number, but got nan."),
        ({"seed": 2**70}, "`seed` must be a whole number from 0 to 4294967295, but got 1180591620717411303424."),
        ({"seed": True}, "`seed` must be int, but got True; see `help(rankscope.profile)`."),
        ({"loss_fn": lambda m, b: (m(b).sum(), m(b))}, "`loss_fn` must return a scalar tensor, but returned tuple; return one number for the batch."),
        ({"loss_fn": lambda m, b: None}, "`loss_fn` must return a scalar tensor, but returned NoneType; do the batches have labels?"),
        ({"loss_fn": lambda m, b: (m(b), b), "head": ("layers.0",)}, "`loss_fn` must return a scalar tensor, but returned tuple; return one number for the batch."),
        ({"loss_fn": None}, "batches must be the model's inputs by name, but got a Tensor; pass `loss_fn`."),
    ],
)  # fmt: skip
def test_options_out_of_range_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(rs.RankscopeError, match=f"^{re.escape(message)}$"):
        rs.profile(Blocks(), rows(), **{"loss_fn": mean_square, **options})


# --- batches -------------------------------------------------------------------------------------------------------


def test_batches_may_be_nested() -> None:
    torch.manual_seed(0)
    model, mask = nn.Linear(6, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    model = nn.Sequential(model)
    flat = [{"x": torch.randn(2, 3, 6), "attention_mask": mask, "input_ids": torch.ones(2, 3)} for _ in range(3)]
    nested = [{"meta": ["a", None], "inputs": dict(batch)} for batch in flat]
    loss = lambda m, b: (m(b["x"]) * b["attention_mask"][..., None]).square().mean()  # noqa: E731
    plain = rs.profile(model, flat, loss_fn=loss)
    found = rs.profile(model, nested, loss_fn=lambda m, b: loss(m, b["inputs"]))
    assert found.metadata["tokens"] == plain.metadata["tokens"] == 9
    for column in ("fisher_trace", "activation_variance"):
        assert found.column(column) == plain.column(column)


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_variances_do_not_suffer_from_means(mean: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 32, generator=generator)
    x[:, 0] += mean
    x, mask = x.to(dtype), torch.rand(6000, generator=generator) > 0.3
    sketched = InputSketch(RandomMatrices(k=56, seed=0).omega(32, torch.device("cpu"))[:, :28])
    for part, kept in zip(x.split(2500), mask.split(2500), strict=True):
        sketched.add(part, kept)
    exact = torch.cov(x[mask].double().T, correction=0)
    assert sketched.variance() == pytest.approx(float(exact.trace()), rel=1e-4)
    assert sketched.second_moment() == pytest.approx(float(x[mask].double().square().sum(1).mean()), rel=1e-4)
    assert sketched.variances()[:4].tolist() == pytest.approx(
        torch.linalg.eigvalsh(exact).flip(0)[:4].tolist(), rel=0.15
    )


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_near_float32(dtype: torch.dtype, sketched: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    batches = rows(6, 32, 64)
    size = 4 if sketched else 40
    loss = lambda m, b: m(b.to(next(m.parameters()).dtype)).float().square().mean()  # noqa: E731
    plain = rs.profile(model, batches, loss_fn=loss, sketch_size=size)
    found = rs.profile(copy.deepcopy(model).to(dtype), batches, loss_fn=loss, sketch_size=size)
    for name, values in plain.spectra(signal=False).items():
        assert found.spectra(signal=False)[name][:4] == pytest.approx(values[:4], rel=0.02)
    assert found.column("gradient_norm") == pytest.approx(plain.column("gradient_norm"), rel=0.02)
    assert found.column("fisher_trace") == pytest.approx(plain.column("fisher_trace"), rel=0.03)
