"""How a model learns: setup, loop, losses, optimizers, processes, checkpoints. Imports common/, model/ and data/."""
