"""From raw collections to training files, and answers from a larger model. Imports common/, model/ and data/."""
