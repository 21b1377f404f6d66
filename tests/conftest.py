"""Fixtures that many tests share: the real digits task, profiled once."""

from collections.abc import Iterator

import pytest
import torch

import rankscope as rs
from rankscope.tasks import Task
from tests.searching.servers import MariaDB, Postgres


@pytest.fixture(scope="session")
def digits() -> Task:
    return rs.load_task("digits-shift")


@pytest.fixture(scope="session")
def digits_profile(digits: Task) -> rs.Profile:
    return rs.profile(
        digits.build_model(),
        list(digits.train_batches(0)),
        loss_fn=digits.loss,
        head=("classifier",),
        head_steps=30,
    )


@pytest.fixture(scope="session")
def digits_budget(digits_profile: rs.Profile) -> rs.ParameterBudget:
    return rs.ParameterBudget.uniform(digits_profile.targets, 1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server on loopback; the tests that use it are marked `postgres`."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mysql() -> Iterator[MariaDB]:
    """A MariaDB server on loopback; the tests that use it are marked `mysql`."""
    server = MariaDB()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _compiles_as_usual() -> Iterator[None]:
    """A controller that a test leaves while it watches a compiled model keeps the compiler off."""
    yield
    torch.compiler.set_stance("default")
