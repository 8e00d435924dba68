"""How a model learns: setup, the loop, losses, optimizers, processes, checkpoints. Imports common/, model/ and data/."""
