"""Spectra of real gradients: the digits transformer, kept whole and sketched, and all-MiniLM-L6 on WordNet glosses."""

import numpy as np
import pytest
import torch

import rankscope as rs
from rankscope.tasks import Task


def exact_spectra(task: Task, batches: list, targets: tuple[rs.TargetModule, ...]) -> dict[str, np.ndarray]:
    """Singular values of autograd's gradient of the mean loss over all examples."""
    model = task.build_model().eval()
    sizes = [len(batch["labels"]) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        (task.loss(model, batch) * size / sum(sizes)).backward()
    return {t.name: torch.linalg.svdvals(model.get_submodule(t.name).weight.grad).numpy() for t in targets}


def relative_errors(profile: rs.Profile, exact: dict[str, np.ndarray], n: int) -> np.ndarray:
    """(modules, n): how far the leading singular values are off."""
    spectra = profile.spectra(signal=False)
    return np.array([np.abs(spectra[name][:n] / values[:n] - 1.0) for name, values in exact.items()])


def test_digits_profile_has_36_rows_and_exact_spectra(digits: Task) -> None:
    model, batches = digits.build_model(), list(digits.train_batches(0))
    profile = rs.profile(model, batches, loss_fn=digits.loss)
    assert len(profile.table) == 36
    assert profile.table["exact"].all()  # modules this small are kept whole
    assert relative_errors(profile, exact_spectra(digits, batches, profile.targets), 4).max() < 0.001  # asked for: 0.05


def test_digits_spectra_when_sketched(digits: Task) -> None:
    model, batches = digits.build_model(), list(digits.train_batches(0))
    profile = rs.profile(model, batches, loss_fn=digits.loss, sketch_size=6)
    assert not profile.table["exact"].any()
    errors = relative_errors(profile, exact_spectra(digits, batches, profile.targets), 2)
    assert np.median(errors) < 0.01
    assert errors.max() < 0.12


@pytest.mark.slow
def test_minilm_spectra_at_default_settings() -> None:
    task = rs.load_task("supersense")
    model, batches = task.build_model(), list(task.train_batches(0))[:8]
    profile = rs.profile(model, batches, loss_fn=task.loss)
    assert set(profile.table.loc[profile.table["role"].isin(["fc1", "fc2"]), "exact"]) == {False}
    exact = exact_spectra(task, batches, profile.targets)
    errors = relative_errors(profile, exact, 8)
    assert np.median(errors) < 0.03
    assert errors.max() < 0.1
    stated, spectra = profile.column("singular_error"), profile.spectra(signal=False)
    scores = [(spectra[n][:8] - exact[n][:8]) / stated[n] for n in exact if stated[n]]
    assert len(scores) == 12
    assert 0.7 < np.sqrt(np.mean(np.square(scores))) < 1.4  # a standard error is as large as the errors are
