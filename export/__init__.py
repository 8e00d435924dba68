"""Writes a model in the formats of other programs: transformers folders, GGUF files. Imports model/ only."""
