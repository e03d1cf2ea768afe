"""What is refused of the settings of queues, and with which words."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from sqla_durable import Durable, errors
from sqla_durable.definitions.queues import QueueOptions


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"concurrency": 1.5}, r"concurrency=1\.5 is not an integer from 1 to 1,000,000\."),
        ({"rate": (0, timedelta(seconds=1))}, r"rate\[0\]=0 is not an integer from 1 to 100,000\."),
        ({"fair": "yes"}, r"fair='yes' is neither True nor False\."),
        ({"fair": True, "weights": ["ada"]}, r"weights=\['ada'\] is no mapping: pass a number for each key, "),
        ({"fair": True, "weights": {"ada": 0}}, r"weights\['ada'\]=0 is not an integer from 1 to 1,000\."),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.ArgumentError, match=reason):
        QueueOptions(**given)


def test_a_pattern_is_no_name_of_a_queue() -> None:
    with pytest.raises(errors.ArgumentError, match=r"'mail\.\*', which is a pattern: a worker claims by patterns"):
        Durable().queue("mail.*", concurrency=1)
