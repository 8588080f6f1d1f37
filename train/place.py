"""Who a process is among those of its job, as its launcher says in the environment. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..data.errors import InputError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "CLASSER_COORDINATOR", "CLASSER_NUM_PROCESSES", "CLASSER_PROCESS_ID"
LAUNCHER = "CLASSER_LAUNCHER"  # the process id of a launcher on this machine
STOPPED_CODE = "CLASSER_STOPPED_CODE"  # exit code of a run that was stopped unfinished; without it 0
# Where a scheduler says the rank in a name of its own.
RANKS = (PROCESS_ID, "SLURM_PROCID", "JOB_COMPLETION_INDEX")
LOGS = "logs"  # of launched processes, in the run's folder


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Who a process is among those of its job.

    Attributes:
      coordinator: HOST:PORT where the first process listens.
      count: processes of the job.
      rank: of this one, from 0.
    """

    coordinator: str
    count: int
    rank: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ProcessInfo | None:
        """What the launcher said; None where there is only this process.

        Raises:
          InputError: it said a part only, or no number.
        """
        if COORDINATOR not in environment:
            return None
        rank = next((environment[name] for name in RANKS if name in environment), "")
        count = environment.get(NUM_PROCESSES, "")
        if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
            raise InputError(
                f"{COORDINATOR} is set, so {NUM_PROCESSES} must be a number and one of {', '.join(RANKS)} a smaller "
                f"one; they are '{count}' and '{rank}'."
            )
        return cls(environment[COORDINATOR], int(count), int(rank))
