"""Claims without locks: the lowest numbers hold, the rest withdraw; a lease that stands still is lost, by the watcher's time."""

import time

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from rankscope.errors import SettingsError, TrainingError
from rankscope.searching import claims as module
from rankscope.searching.claims import (
    FAILURE_KEY,
    JOB_KEY,
    LEASE_KEY,
    LOST_KEY,
    RETRIES,
    WITHDRAWN_KEY,
    Claims,
    Job,
    Lease,
    Tally,
    perform,
    tally,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def look_often(watch: Claims, clock: Clock, times: int, pause: float) -> None:
    """So many looks, each with a pause after it, in seconds."""
    for _ in range(times):
        watch.look()
        clock.now += pause


def study() -> optuna.Study:
    return optuna.create_study(direction="maximize")


def add(study: optuna.Study, job: str, state: TrialState = TrialState.RUNNING, **attributes: str) -> int:
    """A trial of another worker."""
    value = 0.5 if state == TrialState.COMPLETE else None
    lease = {LEASE_KEY: [f"other {len(study.trials)}", 0, 30.0]}
    template = create_trial(state=state, value=value, user_attrs={JOB_KEY: job, **attributes}, system_attrs=lease)
    return study._storage.create_new_trial(study._study_id, template_trial=template)


def test_the_lowest_numbers_hold_as_many_places_as_a_job_has() -> None:
    shared = study()
    first, second = Claims(shared, 30.0), Claims(shared, 30.0)
    one, two = first.take(Job("a")), second.take(Job("b", 2))
    assert one is not None
    assert two is not None
    assert (one.number, two.number) == (0, 1)
    assert second.take(Job("a")) is None
    assert shared.trials[2].state == TrialState.FAIL
    assert shared.trials[2].user_attrs[WITHDRAWN_KEY] == "others were first"
    assert first.take(Job("b", 2)) is not None
    assert first.take(Job("b", 2)) is None
    assert first.tell(one, 0.5)
    assert first.take(Job("a")) is None  # it is done


def test_a_claim_that_comes_between_look_and_claim_is_seen() -> None:
    """Two workers saw the same free place: whichever has the lower number runs, though it looks later."""
    shared = study()
    number = add(shared, "a")
    mine = Claims(shared, 30.0)
    late = create_trial(state=TrialState.RUNNING, user_attrs={JOB_KEY: "a"}, system_attrs={LEASE_KEY: ["me", 0, 30.0]})
    shared._storage.create_new_trial(shared._study_id, template_trial=late)
    theirs = Claims(shared, 30.0)._held(shared.trials[number], Job("a"), shared.trials, None)
    assert theirs is not None
    assert mine._held(shared.trials[1], Job("a"), shared.trials, None) is None


def test_what_counts_for_a_job() -> None:
    shared = study()
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        add(shared, "a", state)
    add(shared, "a", TrialState.FAIL, **{FAILURE_KEY: "it diverged"})
    add(shared, "a", TrialState.FAIL, **{WITHDRAWN_KEY: "KeyboardInterrupt"})
    add(shared, "a", TrialState.FAIL, **{LOST_KEY: "its worker gave no sign of life"})
    found = tally(shared.trials)["a"]
    assert [trial.number for trial in found.done] == [0, 1, 3]
    assert (len(found.held), found.lost) == (1, 1)
    assert (found.spent(6), found.free(6)) == (3, 2)


def test_a_job_that_loses_its_workers_again_and_again_is_given_up() -> None:
    assert [Tally(lost=n).free(1) for n in range(RETRIES + 3)] == [1] * (RETRIES + 1) + [0, 0]
    assert Tally(lost=2 * RETRIES + 1).free(2) == 1


def test_a_lease_that_stands_still_is_lost(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    shared = study()
    number = add(shared, "a")
    watch = Claims(shared, 30.0)
    look_often(watch, clock, 6, pause=5.0)
    assert shared.trials[number].state == TrialState.RUNNING
    watch.look()
    clock.now += 5.0
    watch.look()
    assert shared.trials[number].state == TrialState.FAIL
    assert shared.trials[number].user_attrs[LOST_KEY] == "its worker gave no sign of life"
    assert caplog.messages == ["trial 0 is lost: its worker gave no sign of life"]
    assert watch.take(Job("a")) is not None


def test_a_lease_that_is_renewed_is_not_lost(clock: Clock) -> None:
    shared = study()
    number, watch = add(shared, "a"), Claims(shared, 30.0)
    for renewal in range(40):
        shared._storage.set_trial_system_attr(number, LEASE_KEY, ["other", renewal // 5, 30.0])
        watch.look()
        clock.now += 5.0
    assert shared.trials[number].state == TrialState.RUNNING


def test_time_without_looks_tells_nothing_of_others(clock: Clock) -> None:
    """A server that is away for minutes, or a machine that sleeps, must not have every other trial failed."""
    shared = study()
    number, watch = add(shared, "a"), Claims(shared, 30.0)
    look_often(watch, clock, 5, pause=3600.0)
    assert shared.trials[number].state == TrialState.RUNNING


def test_leases_last_as_long_as_their_holders_say(clock: Clock) -> None:
    shared = study()
    number, watch = add(shared, "a"), Claims(shared, 2.0)
    look_often(watch, clock, 60, pause=0.4)
    assert shared.trials[number].state == TrialState.RUNNING


def test_a_worker_that_was_thought_lost_is_told(caplog: pytest.LogCaptureFixture) -> None:
    shared = study()
    slow = Claims(shared, 0.06)
    claim = slow.take(Job("a"))
    assert claim is not None

    def work(lease: Lease) -> float:
        Claims(shared, 30.0)._fail(claim.trial_id, LOST_KEY, "its worker gave no sign of life")
        for _ in range(200):
            lease.check()
            time.sleep(0.01)
        return 0.5

    assert not perform(slow, claim, work, "trial 0")
    assert shared.trials[0].state == TrialState.FAIL
    message = "trial 0 was given to another worker, since this one gave no sign of life: its result is dropped"
    assert caplog.messages == [message]


def test_a_result_that_comes_too_late_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    shared = study()
    slow = Claims(shared, 30.0)
    claim = slow.take(Job("a"))
    assert claim is not None
    slow._fail(claim.trial_id, LOST_KEY, "its worker gave no sign of life")
    assert not slow.tell(claim, 0.5)
    assert shared.trials[0].state == TrialState.FAIL


def test_a_lease_is_renewed_while_its_worker_works() -> None:
    shared = study()
    claims = Claims(shared, 0.3)
    claim = claims.take(Job("a"))
    assert claim is not None
    with Lease(claims, claim):
        time.sleep(0.4)
    assert shared.trials[0].system_attrs[LEASE_KEY][1] >= 2


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (TrainingError("the loss is not finite."), "the loss is not finite."),
        (MemoryError("no room"), "it ran out of memory (no room); use smaller batches."),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
         "it ran out of memory (CUDA out of memory. Tried to allocate 9 GiB); use smaller batches."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
         "it ran out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.); use smaller batches."),
    ],
)  # fmt: skip
def test_a_training_that_fails_fails_its_trial_only(
    error: Exception, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    shared = study()
    claims = Claims(shared, 30.0)
    claim = claims.take(Job("a"))
    assert claim is not None

    def work(lease: Lease) -> float:
        raise error

    assert perform(claims, claim, work, "trial 0")
    assert (shared.trials[0].state, shared.trials[0].user_attrs[FAILURE_KEY]) == (TrialState.FAIL, failure)
    assert caplog.messages == [f"trial 0 failed: {failure}"]
    assert tally(shared.trials)["a"].spent(1) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SettingsError("broken."), KeyError("a bug")])
def test_any_other_error_gives_the_claim_up(error: BaseException) -> None:
    shared = study()
    claims = Claims(shared, 30.0)
    claim = claims.take(Job("a"))
    assert claim is not None

    def work(lease: Lease) -> float:
        raise error

    with pytest.raises(type(error)):
        perform(claims, claim, work, "trial 0")
    assert shared.trials[0].user_attrs[WITHDRAWN_KEY] == type(error).__name__
    assert claims.take(Job("a")) is not None


def test_a_trial_that_a_user_queued_takes_a_place() -> None:
    shared = study()
    shared.enqueue_trial({"tau": 1.0})
    claims = Claims(shared, 30.0)
    claim = claims.take_queued(Job("a", 2), shared.trials)
    assert claim is not None
    assert (claim.number, tally(shared.trials)["a"].free(2)) == (0, 1)
    assert claims.take_queued(Job("a", 2), shared.trials) is None


def test_a_trial_that_a_server_made_twice_is_one() -> None:
    """It wrote the trial, but its answer was lost, so that the call was tried again."""

    class Twice(optuna.storages.InMemoryStorage):
        def create_new_trial(self, study_id, template_trial=None):
            super().create_new_trial(study_id, template_trial)
            return super().create_new_trial(study_id, template_trial)

    shared = optuna.create_study(storage=Twice(), direction="maximize")
    claim = Claims(shared, 30.0).take(Job("a"))
    assert claim is not None
    assert [trial.state for trial in shared.trials] == [TrialState.RUNNING, TrialState.FAIL]
