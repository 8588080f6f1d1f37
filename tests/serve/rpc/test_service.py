"""What the gRPC service does by itself, without a server; tests/serve/rpc/test_server.py and test_models.py call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from classer.serve.rpc.service import in_order


@pytest.mark.parametrize("failing", ["nothing", "requests", "work"])
def test_answers_come_in_order_and_no_more_is_read_than_is_worked_on(failing: str) -> None:
    read: list[int] = []
    given_up: list[int] = []

    async def requests() -> AsyncIterator[int]:
        for i in range(6):
            if failing == "requests" and i == 4:
                raise OSError("no more")
            read.append(i)
            yield i

    async def others_run() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def main() -> None:
        done = [asyncio.Event() for _ in range(6)]

        async def work(i: int) -> int:
            try:
                await done[i].wait()
            except asyncio.CancelledError:
                given_up.append(i)
                raise
            if failing == "work" and i == 3:
                raise OSError("no more")
            return i

        answers = in_order(requests(), work, 2)
        first = asyncio.create_task(anext(answers))
        await others_run()
        assert read == [0, 1]
        done[1].set()  # the one before it is not done
        await others_run()
        assert (read, first.done()) == ([0, 1], False)
        done[0].set()
        assert await first == 0
        await others_run()  # the next answer is not requested
        assert read == [0, 1, 2]
        done[2].set()
        assert [await anext(answers), await anext(answers)] == [1, 2]
        done[3].set()
        await others_run()
        if failing == "nothing":
            assert await anext(answers) == 3
            await others_run()
            await answers.aclose()
            assert (read, given_up) == ([0, 1, 2, 3, 4, 5], [4, 5])
            return
        if failing == "requests":
            assert await anext(answers) == 3
        with pytest.raises(OSError, match="no more"):
            await anext(answers)
        assert given_up == ([4] if failing == "work" else [])

    asyncio.run(main())
