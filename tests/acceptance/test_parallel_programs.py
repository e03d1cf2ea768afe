"""Random workflows of branches in branches, killed and replayed with other speeds: the same keys, each step once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.acceptance.application import Application, Called, Form
from tests.acceptance.programs import STEPS, Block, Gate, Interpreter, PowerCut, expected, leaves, programs
from tests.acceptance.shells import Shell


class Scene:
    """What the one workflow of this story executes now."""

    def __init__(self, app: Application) -> None:
        self.gate = Gate([], [])
        self.block: Block = ()
        self._form = app.form
        self._steps = {name: self._step(app, name) for name in STEPS}

        async def program() -> list[Any]:
            self.gate.begin()
            return await Interpreter(self._form, self.gate, self._steps).run(self.block)

        self.workflow = app.workflow(program)

    def _step(self, app: Application, name: str) -> Called[[], str]:
        def waiting() -> str:
            return self.gate.step()

        async def awaiting() -> str:
            return await self.gate.astep()

        made: Any = app.durable.step(awaiting if app.form is Form.ASYNC else waiting, name=name)
        return Called(made)


def _to_the_end(shell: Shell, scene: Scene, workflow_id: UUID) -> list[Any]:
    while True:
        try:
            return shell.finish(scene.workflow, workflow_id)
        except (PowerCut, BaseExceptionGroup):  # several at once, where branches are tasks
            continue


# behaviour: S7
@pytest.mark.shells(["executor", "joined", "worker", "async-executor", "async-joined", "async-worker"])
def test_random_branches_have_the_same_keys_at_any_speed_and_after_any_crash(shell: Shell, app: Application) -> None:
    scene = Scene(app)
    with ExitStack() as stack:
        is_worker = "Worker" in type(shell).__name__
        if is_worker:
            stack.enter_context(shell.background())

        @settings(
            max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
        )
        @given(programs, st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 8), max_size=2))
        def check(block: Block, order: list[int], kills: list[int]) -> None:
            scene.block, scene.gate = block, Gate(order, list(kills))
            keys = expected(block)
            with shell.client() as client:
                workflow_id = client.start(scene.workflow).id
                client.flush()
                client.commit()
            found = shell.result(scene.workflow, workflow_id) if is_worker else _to_the_end(shell, scene, workflow_id)
            assert found == keys
            assert scene.gate.executed == dict.fromkeys(leaves(keys), 1)
            assert sorted(each.key for each in shell.one(workflow_id).steps) == sorted(leaves(keys))

        check()
