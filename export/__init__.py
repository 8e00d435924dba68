"""A model in the formats of other programs: transformers folders, GGUF files. Imports common/ and model/."""
