"""The bytes of a packed file, and the rows of a Parquet file; damage in them is an error, never a silent end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

DAMAGED = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged or cut-off file raises
ZSTANDARD_BYTES = 2**14  # unpacked at a time; of a file made to harm they are 64 MB at most


def open_bytes(path):
    """Opens a plain, gzip or zstandard file for reading bytes."""
    path = Path(path)
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path), 2**20)
    return open(path, "rb", buffering=2**20)


class _Zstandard(io.RawIOBase):
    """The content of a zstandard file, all its frames. (The library's own reader ends without a word behind the first
    frame, and where a frame is cut off.)"""

    def __init__(self, path):
        import zstandard

        self.new_frame, self.error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self.file, self.frame = open(path, "rb"), None
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            packed = self.packed or self.file.read(ZSTANDARD_BYTES)  # what the last frame left over comes first
            if not packed:
                if self.frame is not None:  # the file ends, the frame does not
                    raise EOFError("it is cut off: its last frame has no end")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.unpacked = memoryview(self.frame.decompress(packed))
            except self.error as error:
                raise OSError(str(error)) from None
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        # As much as the caller has room for; the rest waits for the next call.
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def parquet_rows(path) -> Iterator[tuple[int, dict]]:
    """(number, row) of each row; one of DAMAGED where the file is no Parquet file, or no whole one."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
            wanted = file.metadata.num_rows  # pyarrow reads a file with damaged counts without an error
    except (pyarrow.ArrowException, OSError) as error:  # errors of pyarrow's own, some of several lines
        raise OSError(str(error).partition("\n")[0]) from None
    if number != wanted:
        raise EOFError(f"it should have {wanted} rows")
