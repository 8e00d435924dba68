"""The network, its tokenizer and its weights; nothing about training. Imports common/."""
