"""OpenAI's API over the scheduler. Imports common/, model/ and inference/."""
