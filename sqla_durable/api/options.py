"""The options of a start: checked when they are given, and what they say about others with the same key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias, get_args

from sqla_durable.definitions.checks import fault_in, require_duration, require_moment, require_positive_duration
from sqla_durable.errors import ArgumentError
from sqla_durable.store import KeyRule

_Unique: TypeAlias = Literal["forever", "unfinished", "unstarted"]
Unique: TypeAlias = _Unique | timedelta
"""How long a key is taken by the workflow that has it."""

OnConflict: TypeAlias = Literal["existing", "refuse", "replace", "cancel_running"]
"""What a start does that finds its key taken."""

DUPLICATES = "unique", "on_conflict", "debounce", "longest_wait", "throttle"
"""The options that say what becomes of starts with the same key."""

_SMALLINT = 32_767
_MOST_TAGS = 100
_CONTRADICTIONS = (
    ("debounce", "throttle"),
    ("debounce", "unique"),
    ("debounce", "on_conflict"),
    ("debounce", "delay"),
    ("debounce", "at"),
    ("throttle", "unique"),
    ("throttle", "replace"),
    ("throttle", "cancel_running"),
    ("unique", "replace"),
    ("unique", "cancel_running"),
)
"""The options, and values of `on_conflict`, that exclude each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """How a workflow is started.

    Args:
        key: an idempotency key: the same workflow and key are the same record, unless `unique` says otherwise.
        queue: the queue to enqueue to; by default the workflow's own.
        by: the key of the queue's limits and turns, such as a tenant's name; see `Durable.queue`.
        tags: texts by name by which people find it, such as `{"tenant": "7"}`; a child has its own only.
        priority: lower is served first; from -32,767 to 32,767, by default 0.
        delay: how long after now it becomes due. Not together with `at`.
        at: when it becomes due, with a time zone. A time in the past is now.
        detached: as a child it is not cancelled with its parent.
        timeout: how long after its first claim it is to be finished, over all its attempts and waits.
        deadline: when it is to be finished whether it was claimed or not: a time with a time zone, or how long after
            this start. With both, the earlier one counts. A workflow that is not finished then fails with
            `WorkflowTimeoutError`.
        unique: how long the key is taken by the workflow that has it: "forever"; while that one is "unfinished"; while
            it is "unstarted"; or for a time from its start.
        on_conflict: what a start does that finds its key taken: it returns the "existing" one; it is to "refuse", by a
            `KeyTakenError`; to "replace" the input and options of one that has not started; or to cancel one that is
            not finished with its tree, "cancel_running", and start beside it. Each of the last two says by itself how
            long the key is taken.
        debounce: how long no other start with the key must have come until the workflow becomes due. The last input
            counts.
        longest_wait: how long after the first start it becomes due at the latest, although there are others.
        throttle: how long after a start others with the key start nothing. The first input counts.

    Raises:
        ArgumentError: an option is blank, out of range, or contradicts another.
    """

    key: str | None = None
    queue: str | None = None
    by: str | None = None
    tags: Mapping[str, str] | None = None
    priority: int = 0
    delay: timedelta | None = None
    at: datetime | None = None
    detached: bool = False
    timeout: timedelta | None = None
    deadline: timedelta | datetime | None = None
    unique: Unique | None = None
    on_conflict: OnConflict | None = None
    debounce: timedelta | None = None
    longest_wait: timedelta | None = None
    throttle: timedelta | None = None

    def __post_init__(self) -> None:
        for name in ("key", "queue", "by"):
            value = getattr(self, name)
            fault = None if value is None else fault_in(value)
            if fault is not None:
                raise ArgumentError(f"{name}={value!r} {fault}: pass a text that is not blank.")
        if self.tags is not None:
            check_tags(self.tags)
        integral = isinstance(self.priority, int)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not integral or abs(self.priority) > _SMALLINT:
            raise ArgumentError(f"priority={self.priority!r} is not an integer from {-_SMALLINT:,} to {_SMALLINT:,}.")
        if self.delay is not None:
            require_duration(self.delay, "delay")
        if self.at is not None:
            require_moment(self.at, "at")
        if self.delay is not None and self.at is not None:
            raise ArgumentError(f"delay={self.delay!r} and at={self.at!r} contradict each other: give one of them.")
        if self.timeout is not None:
            require_positive_duration(self.timeout, "timeout")
        if isinstance(self.deadline, datetime):
            require_moment(self.deadline, "deadline")
        elif self.deadline is not None:
            require_positive_duration(self.deadline, "deadline")
        self._check_duplicates()

    def _check_duplicates(self) -> None:
        for name in ("debounce", "longest_wait", "throttle"):
            if getattr(self, name) is not None:
                require_positive_duration(getattr(self, name), name)
        if isinstance(self.unique, timedelta):
            require_positive_duration(self.unique, "unique")
        elif self.unique is not None and self.unique not in get_args(_Unique):
            raise ArgumentError(f"unique={self.unique!r} is none of {_listed(_Unique)}, or a timedelta.")
        if self.on_conflict is not None and self.on_conflict not in get_args(OnConflict):
            raise ArgumentError(f"on_conflict={self.on_conflict!r} is none of {_listed(OnConflict)}.")
        self._refuse_contradictions()
        if (self.debounce is None) != (self.longest_wait is None):
            raise ArgumentError(
                "debounce and longest_wait are given together: without a longest wait, what is started again and again "
                "would never become due."
            )
        if self.debounce is not None and self.longest_wait is not None and self.longest_wait < self.debounce:
            raise ArgumentError(
                f"longest_wait={self.longest_wait!r} is shorter than debounce={self.debounce!r}: without effect."
            )

    def _refuse_contradictions(self) -> None:
        given = {each for each in (*DUPLICATES, "delay", "at") if getattr(self, each) not in (None, "existing")}
        given |= {self.on_conflict} if self.on_conflict in ("replace", "cancel_running") else set()
        for first, second in _CONTRADICTIONS:
            if {first, second} <= given:
                raise ArgumentError(f"{first} and {second} contradict each other: give one of them.")

    @property
    def needs_key(self) -> str:
        """The names of the options that are about what has the same key."""
        return " and ".join(each for each in DUPLICATES if getattr(self, each) is not None)

    @property
    def rule(self) -> KeyRule | None:
        """The rule for what has the same key; None if that is the same workflow for ever."""
        on_conflict, unique = self.on_conflict or "existing", self.unique or self.throttle or "forever"
        if self.debounce is not None and self.longest_wait is not None:
            return KeyRule("replace", "unstarted", longest_wait=self.longest_wait.total_seconds())
        if on_conflict == "replace":
            return KeyRule("replace", "unstarted")
        if on_conflict == "cancel_running":
            return KeyRule("cancel_running", "unfinished")
        if isinstance(unique, timedelta):
            return KeyRule(on_conflict, "period", unique.total_seconds())
        return None if (on_conflict, unique) == ("existing", "forever") else KeyRule(on_conflict, unique)


def check_tags(tags: Mapping[str, str]) -> None:
    """Check the tags of a workflow.

    Raises:
        ArgumentError: they are no mapping of names to texts, or too many.
    """
    if not isinstance(tags, Mapping) or len(tags) > _MOST_TAGS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"tags={tags!r} is no mapping of at most {_MOST_TAGS} names to texts.")
    for name, value in tags.items():
        for text in (name, value):
            fault = fault_in(text)
            if fault is not None:
                raise ArgumentError(f"tags={tags!r}: {text!r} {fault}: a tag and its value are texts, not blank.")


def _listed(literal: object) -> str:
    return ", ".join(map(repr, get_args(literal)))
