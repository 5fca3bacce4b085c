"""Files of text, gzipped or not."""

import gzip
import zlib
from pathlib import Path

from pared.errors import ParedError


def read_text(path: Path, what: str = "file") -> str:
    """Read a UTF-8 file, gzipped if its name ends so.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        ParedError: missing, not UTF-8 or a damaged archive; names the file.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ParedError(f"{what} {path}: not readable ({error})") from None
    except OSError as error:
        raise ParedError(f"{what} {path}: {error.strerror or error}") from None


def read_lines(path: Path) -> list[str]:
    """Read the lines of a file; not those of ``splitlines``, as texts hold U+2028, U+0085 and others it splits at."""
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]
