"""A story: an agent that asks a model in a loop, and streams what it answers while it does."""

from __future__ import annotations

from collections.abc import Iterator

import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import Workflow, set_event, write_stream
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.readers import event, stream
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

ANSWERS = {
    "what is in stock?": "search: stock",
    "stock is 3": "search: price",
    "price is 5": "three at five each",
}


class Model:
    """Answers word by word, and breaks off in the middle of one answer, once."""

    def __init__(self, breaks_at: str) -> None:
        self.calls: list[str] = []
        self._breaks_at = breaks_at

    def answer(self, prompt: str) -> Iterator[str]:
        self.calls.append(prompt)
        for word in ANSWERS[prompt].split(" "):
            if word == self._breaks_at:
                self._breaks_at = ""
                raise ConnectionError("the model is gone")
            yield word


def agent_of(app: Application, model: Model) -> AnyWorkflow[[str], str]:
    """Return a workflow that asks the model, and searches for what it wants to know, until it answers."""

    async def ask(prompt: str) -> str:
        words: list[str] = []
        for word in model.answer(prompt):
            words.append(word)
            await either.write_stream("answers", word)
            await either.heartbeat({"words": len(words)})
        return " ".join(words)

    def search(session: Session, what: str) -> str:
        session.add(Entry(account=what, cents=1))
        set_event("searched for", what, session=session)
        write_stream("answers", f"[{what}]", session=session)
        return f"{what} is {3 if what == 'stock' else 5}"

    asking = app.publishing(ask, wait=tenacity.wait_none())
    searching = app.transactional(search)

    async def agent(prompt: str) -> str:
        for turn in range(1, 9):
            await either.set_event("turn", turn)
            answer = await asking(prompt)
            if not answer.startswith("search: "):
                await either.close_stream("answers")
                return answer
            prompt = await searching(answer.removeprefix("search: "))
        raise AssertionError("the agent does not come to an end")

    return app.workflow(agent)


# behaviour: C4 C5
def test_an_agent_streams_what_it_thinks_and_marks_what_a_failed_try_wrote(shell: Shell, app: Application) -> None:
    model = Model(breaks_at="price")

    workflow = agent_of(app, model)
    assert shell.run(workflow, "what is in stock?") == "three at five each"
    with shell.sessionmaker() as session:
        (workflow_id,) = session.scalars(select(Workflow.id))
        assert sorted(session.scalars(select(Entry.account))) == ["price", "stock"]
    assert (event(shell, workflow_id, "turn"), event(shell, workflow_id, "searched for")) == (3, "price")

    entries = stream(shell, workflow_id, "answers", wanted=str)
    said = [(each.step_key, each.try_number, each.value) for each in entries]
    assert said == [
        ("ask", 1, "search:"),
        ("ask", 1, "stock"),
        ("search", 1, "[stock]"),
        ("ask#2", 1, "search:"),
        ("ask#2", 2, "search:"),
        ("ask#2", 2, "price"),
        ("search#2", 1, "[price]"),
        *(("ask#3", 1, word) for word in ("three", "at", "five", "each")),
    ]
    assert [each.number for each in entries] == list(range(11))

    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "three at five each"
    assert len(model.calls) == 4
    assert stream(shell, workflow_id, "answers", wanted=str) == entries
