"""The rank of a process in its job, read from the environment that the launcher sets. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..data.errors import InputError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "CLASSER_COORDINATOR", "CLASSER_NUM_PROCESSES", "CLASSER_PROCESS_ID"
LAUNCHER = "CLASSER_LAUNCHER"  # the process id of a launcher on this machine
STOPPED_CODE = "CLASSER_STOPPED_CODE"  # exit code of a run that was stopped unfinished; without it 0
# Variables that may hold the rank: ours, and those of schedulers.
RANKS = (PROCESS_ID, "SLURM_PROCID", "JOB_COMPLETION_INDEX")
LOGS = "logs"  # folder of the processes' outputs, in the run's folder


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """The rank of a process in its job.

    Attributes:
      coordinator: HOST:PORT where the primary process listens.
      count: number of processes in the job.
      rank: of this process, from 0; rank 0 is the primary.
    """

    coordinator: str
    count: int
    rank: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Reads the launcher's variables; None where this is the only process.

        Raises:
          InputError: a variable is missing, or is not a number.
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
