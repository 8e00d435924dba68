"""What happens inside a model and in its runs, as numbers: tokens, probabilities, attention, layers; logs of training.

Nothing here draws. The page and the course's figures do. Imports common/, model/ and inference/."""
