"""How a model answers: cache, batches, sampling, streams, log-probabilities. Imports common/ and model/."""
