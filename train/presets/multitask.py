"""Many tasks in one encoder, by a curriculum: binary, then multiclass and multilabel, then hierarchical tasks.

    classer train --preset multitask --data FOLDER --texts 10000 --held-out-texts 3000 --out runs/multitask

FOLDER holds one folder a task, each with task.json and its splits. What it reached, and on what, is in
docs/benchmarks/many-tasks.md.
"""

from ..config import CurriculumStage, Recipe

# Small tasks come more often than their share (temperature 2); a fifth of what later stages see is from earlier ones.
RECIPE = Recipe(
    max_length=128,
    learning_rate=1e-4,
    dropout=0.1,
    dev_fraction=0.05,
    curriculum=(
        CurriculumStage("binary", kinds=("binary",), temperature=2.0),
        CurriculumStage("flat", kinds=("multiclass", "multilabel"), temperature=2.0, replay=0.2, epochs=2),
        CurriculumStage("hierarchical", kinds=("hierarchical",), temperature=2.0, replay=0.3, epochs=4),
    ),
)
