"""One process at a time writes the same files."""

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
