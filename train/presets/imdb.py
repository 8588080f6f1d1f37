"""IMDb: is a film review positive, for every focus, from MiniLM-L6 (22.7M parameters).

classer train --preset imdb --data train.jsonl.gz --texts 11000 --out runs/imdb

On 1,100 held-out training texts, seed 0: 89.6 % dense, 87.2 % at focus 0.35 (90.8 % before it was taught to focus); 69
minutes on two CPU cores that were also busy with other work. docs/focused-attention.md has the figures.
"""

from ..config import Recipe

# One pass each: on two CPU cores a pass over 10,000 reviews of up to 512 tokens takes half an hour.
RECIPE = Recipe(max_length=512, epochs=1, focus_epochs=1, batch_size=16, learning_rate=1e-4, dev_fraction=0.1)
