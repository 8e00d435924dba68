"""Training: flags, data, the loop. Its files are also read by programs that do not train: see trainer/engine.py."""
