"""Claims: any number of workers share a study, and each piece of its work is done once.

A worker claims a job by creating a running trial that names it; a storage writes that in one step, and numbers trials in one
order that all workers see. Of the claims on a job those with the lowest numbers hold, as many as it has places; the others
withdraw. This needs no lock, no queue, and no clock or name of any host.

A claim carries a lease, a number that its worker raises every few seconds. Others watch whether it changes, by their own time
and only while they look: a trial whose lease stands still is lost, and its job free again. A worker that was only slow cannot
report what it trained, since its trial is failed already.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, NamedTuple, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from rankscope.distributed import free_memory, is_out_of_memory
from rankscope.errors import RankscopeError, TrainingError, one_line
from rankscope.searching.storage import FAILURE_KEY, SAMPLER, STEPS_KEY

logger = logging.getLogger(__name__)

JOB_KEY = "job"  # trial attribute: what it claims; without it, as where a user queued it, a place among the proposals
LOST_KEY = "lost"  # trial attribute: its worker gave no sign of life
WITHDRAWN_KEY = "withdrawn"  # trial attribute: why its worker gave it up; it trained nothing that counts
# A system attribute: who holds the trial, how often the lease was renewed, after how many seconds it ends.
LEASE_KEY = "rankscope:lease"
RETRIES = 3  # of a job whose workers died
RENEWALS = 6  # of a lease in the time after which it ends
LONGEST_PAUSE = 2.0  # seconds between looks of a worker that waits


class LostError(Exception):
    """Another worker has this trial: this one gave no sign of life."""


class Job(NamedTuple):
    """A piece of work: its name in the study, and how many trials it takes."""

    name: str
    places: int = 1


class Claim(NamedTuple):
    """A trial that holds a place of a job."""

    trial_id: int
    number: int
    lease: Any
    trials: list[FrozenTrial]  # all, as they were when it was found to hold


class Tally(NamedTuple):
    """The trials of one job."""

    done: tuple[FrozenTrial, ...] = ()  # completed, pruned, or failed of their own
    held: tuple[FrozenTrial, ...] = ()  # running
    lost: int = 0  # their workers died

    def spent(self, places: int) -> int:
        """Places that need no further trial: of a job that loses its workers again and again, also without a result."""
        return min(places, len(self.done) + max(0, self.lost - RETRIES * places))

    def free(self, places: int) -> int:
        """Places that nobody has claimed."""
        return places - self.spent(places) - len(self.held)


def job_of(trial: FrozenTrial) -> str:
    """The name of the job that a trial claims."""
    return str(trial.user_attrs.get(JOB_KEY, SAMPLER))


def finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: it completed, was pruned, or failed of its own."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or FAILURE_KEY in trial.user_attrs


def tally(trials: Sequence[FrozenTrial]) -> dict[str, Tally]:
    """The tallies of all jobs that any trial claims, by name."""
    done: dict[str, list[FrozenTrial]] = {}
    held: dict[str, list[FrozenTrial]] = {}
    lost: dict[str, int] = {}
    for trial in trials:
        job = job_of(trial)
        if finished(trial):
            done.setdefault(job, []).append(trial)
        elif trial.state == TrialState.RUNNING:
            held.setdefault(job, []).append(trial)
        elif LOST_KEY in trial.user_attrs:
            lost[job] = lost.get(job, 0) + 1
    names = {*done, *held, *lost}
    return {job: Tally(tuple(done.get(job, ())), tuple(held.get(job, ())), lost.get(job, 0)) for job in names}


class Claims:
    """One worker's claims on a study's jobs, and its watch over those of others."""

    def __init__(self, study: optuna.Study, seconds: float) -> None:
        """Claims end after so many seconds without a sign of life."""
        self.study, self.seconds = study, seconds
        self._storage, self._lock = study._storage, Lock()
        self._looked = time.monotonic()
        self._seen: dict[int, tuple[Any, float]] = {}  # by trial: its lease, and for how many seconds it is the same

    def look(self) -> list[FrozenTrial]:
        """All trials, in order; those whose lease has stood still too long are failed first."""
        with self._lock:
            trials = self.study.get_trials(deepcopy=False)
            # Time in which nobody looked, as while a server was away or this machine slept, tells nothing of others.
            now, step = time.monotonic(), self.seconds / RENEWALS
            attentive, self._looked = min(now - self._looked, step), now
            running, seen = {trial._trial_id: trial for trial in trials if trial.state == TrialState.RUNNING}, {}
            for key, trial in running.items():
                lease, (before, age) = trial.system_attrs.get(LEASE_KEY), self._seen.get(key, (None, -attentive))
                seen[key] = lease, age + attentive if lease == before or key not in self._seen else 0.0
            self._seen = seen
            still = [running[key] for key, (lease, age) in seen.items() if age >= _length(lease, self.seconds)]
        for trial in still:
            logger.warning("trial %d is lost: its worker gave no sign of life", trial.number)
            self._fail(trial._trial_id, LOST_KEY, "its worker gave no sign of life")
        return self.study.get_trials(deepcopy=False) if still else trials

    def take(
        self, job: Job, attributes: Mapping[str, Any] | None = None, template: Mapping[str, Any] | None = None
    ) -> Claim | None:
        """Claim a place of a job; None where others were first.

        Args:
            job: What to claim.
            attributes: Of the trial.
            template: Further arguments of `optuna.trial.create_trial`.
        """
        lease: Any = [uuid.uuid4().hex, 0, self.seconds]
        attributes = {JOB_KEY: job.name, **(attributes or {})}
        claim = create_trial(
            state=TrialState.RUNNING, user_attrs=attributes, system_attrs={LEASE_KEY: lease}, **(template or {})
        )
        self._storage.create_new_trial(self.study._study_id, template_trial=claim)
        trials = self.look()
        # A server that went away while it answered has made two of one.
        mine, *copies = [trial for trial in trials if trial.system_attrs.get(LEASE_KEY) == lease]
        for copy in copies:
            self._fail(copy._trial_id, WITHDRAWN_KEY, "made twice")
        return self._held(mine, job, trials, lease)

    def take_queued(self, job: Job, trials: Sequence[FrozenTrial]) -> Claim | None:
        """Claim a place of a job for the first trial that a user has queued, if there is one; as `take`."""
        for trial in (each for each in trials if each.state == TrialState.WAITING):
            with suppress(UpdateFinishedTrialError):
                if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    lease: Any = [uuid.uuid4().hex, 0, self.seconds]
                    self._storage.set_trial_system_attr(trial._trial_id, LEASE_KEY, lease)
                    self._storage.set_trial_user_attr(trial._trial_id, JOB_KEY, job.name)
                    return self._held(trial, job, self.look(), lease)
        return None

    def _held(self, mine: FrozenTrial, job: Job, trials: list[FrozenTrial], lease: Any) -> Claim | None:
        """The claim, if so few are before it that it has a place; else its trial is withdrawn."""
        before = tally([t for t in trials if t.number != mine.number and (finished(t) or t.number < mine.number)])
        if before.get(job.name, Tally()).free(job.places) > 0:
            return Claim(mine._trial_id, mine.number, lease, trials)
        self.withdraw(mine._trial_id, "others were first")
        return None

    def withdraw(self, trial_id: int, reason: str) -> None:
        """Give a claim up; its place is free again."""
        self._fail(trial_id, WITHDRAWN_KEY, reason)

    def _fail(self, trial_id: int, key: str, reason: str) -> None:
        with suppress(UpdateFinishedTrialError):  # by another worker, or by its own
            self._storage.set_trial_user_attr(trial_id, key, reason)
            self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def tell(
        self, claim: Claim, value: float | None = None, failure: str | None = None, *, pruned: bool = False
    ) -> bool:
        """Report how a trial ended; False, with a warning, where it was given to another worker meanwhile."""
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE if failure is None else TrialState.FAIL
        try:
            if failure is not None:
                self._storage.set_trial_user_attr(claim.trial_id, FAILURE_KEY, failure)
            self.study.tell(claim.number, value, state=state)
        except (UpdateFinishedTrialError, ValueError):  # the latter by `tell`, of a trial that is finished
            kept = self._storage.get_trial(claim.trial_id)
            if not kept.state.is_finished():
                raise
            if (kept.state, kept.value) != (state, kept.value if value is None else value):
                self.drop(claim.number)
                return False  # else a server went away after it had written it
        return True

    def drop(self, number: int) -> None:
        """Say that a result is dropped, since its trial was given to another worker."""
        logger.warning(
            "trial %d was given to another worker, since this one gave no sign of life: its result is dropped", number
        )


class Lease:
    """Keeps a claim alive by a thread, which watches others' claims as well.

    Attributes:
        steps: Optimizer steps taken under it; see `on_step`.
    """

    def __init__(self, claims: Claims, claim: Claim) -> None:
        self.steps = 0
        self._claims, self._trial_id, self._lease = claims, claim.trial_id, list(claim.lease)
        self._stop, self._lost = Event(), False
        self._thread = Thread(target=self._renew, daemon=True, name=f"lease of trial {claim.number}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)  # not while a server is away: Ctrl-C must be heard

    def check(self) -> None:
        """Raise `LostError` if the trial was given to another worker."""
        if self._lost:
            raise LostError

    def on_step(self, _step: int) -> None:
        """Count an optimizer step, and raise as `check` does."""
        self.check()
        self.steps += 1

    def _renew(self) -> None:
        storage = self._claims._storage
        try:
            while not self._stop.wait(self._claims.seconds / RENEWALS):
                self._lease[1] += 1
                try:
                    storage.set_trial_system_attr(self._trial_id, LEASE_KEY, list(self._lease))
                    self._claims.look()
                except UpdateFinishedTrialError:
                    self._lost = not self._stop.is_set()
                    return
                except RankscopeError as error:  # the storage does not answer, which the run's own end will say
                    logger.warning("%s", error)
        finally:
            storage.remove_session()


def perform(claims: Claims, claim: Claim, work: Callable[[Lease], float], what: str) -> bool:
    """Do the work of a claim; report its value and steps, or why its training failed. False where others have the trial now.

    A training that diverges or runs out of memory fails its trial only. Any other error gives the claim up, and is raised.
    """
    value, failure, pruned = None, None, False
    try:
        with Lease(claims, claim) as lease:
            try:
                value = work(lease)
            finally:
                claims.study._storage.set_trial_user_attr(claim.trial_id, STEPS_KEY, lease.steps)
    except optuna.TrialPruned:
        pruned = True
    except (LostError, UpdateFinishedTrialError):
        claims.drop(claim.number)
        return False
    except BaseException as error:
        if isinstance(error, TrainingError):
            failure = str(error)
        elif is_out_of_memory(error):
            failure = f"it ran out of memory ({one_line(error, 200)}); use smaller batches."
        else:
            with suppress(RankscopeError):  # the storage's, which the error may be about
                claims.withdraw(claim.trial_id, type(error).__name__)
            raise
    if failure is not None:
        logger.warning("%s failed: %s", what, failure)
        free_memory()
    return claims.tell(claim, value, failure, pruned=pruned)


class Patience:
    """Pauses between looks: short at first, longer while nothing happens."""

    def __init__(self) -> None:
        self._pause = 0.02

    def wait(self) -> None:
        """Pause."""
        time.sleep(random.uniform(0.5, 1.0) * self._pause)
        self._pause = min(1.5 * self._pause, LONGEST_PAUSE)


def _length(lease: Any, otherwise: float) -> float:
    """Seconds after which a lease ends, by its holder; of a trial without a lease, as this worker has it."""
    return float(lease[2]) if lease else otherwise
