"""IMDb: is a film review positive, for every focus, from MiniLM-L6 (22.7M parameters).

    classer train --preset imdb --data FOLDER --out runs/imdb

FOLDER holds the official split (25,000 / 25,000) as task.json, train.jsonl and test.jsonl. Nine minutes on a part of
one H100; on two CPU cores an epoch takes an hour, and `--epochs 1 --focus-epochs 1 --texts 11000` is what one can wait
for. docs/internals/focus.md has the figures.
"""

from ..config import Recipe

RECIPE = Recipe(
    max_length=512,
    epochs=2,
    focus_epochs=7,
    batch_size=64,
    learning_rate=1.5e-4,
    dropout=0.1,
    remat=True,
    dev_fraction=0.05,
    patience=0,
)
