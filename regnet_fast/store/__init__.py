"""What is kept on disk: compiled kernels and verdicts. The key of an entry is a digest of all that it depends on.

An entry is one file: the SHA-256 of its content, then the content. It is made under a lock of its own that ends with
the process, and put in place whole, so that readers, races and killed processes never see half of one; a file whose
digest does not fit is made again. A folder that cannot be written costs only the keeping.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: whoever comes second compiles as well, and the same is put in place again
    fcntl = None

_DIGEST = hashlib.sha256().digest_size


class CacheWarning(UserWarning):
    """Compiled kernels or verdicts cannot be kept on disk."""


def user_folder(kind: str = "kernels") -> Path:
    """$REGNET_FAST_CACHE, else the user's cache directory; and in it the folder of a kind of entries."""
    root = os.environ.get("REGNET_FAST_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "regnet_fast"
    return Path(root) / kind


def key(*parts: str | bytes) -> str:
    """The digest of several parts, each as long as it is."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def stored(key: str, make: Callable[[], bytes], folder: Path | None = None, wait: bool = True) -> bytes:
    """The content of an entry, made and kept where there is none. Raises what `make` raises, and BlockingIOError where
    another process is making it and there is no `wait` for that.

    Warns once for each folder that cannot keep it.
    """
    path = (folder or user_folder()) / key
    return read(path) or updated(path, lambda found: make() if found is None else found, wait)


def read(path: Path) -> bytes | None:
    """The content of an entry, or None where there is none that is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def updated(path: Path, change: Callable[[bytes | None], bytes], wait: bool = True) -> bytes:
    """What `change` makes of an entry's content, None where there is none; kept in its place. Nobody else writes the
    entry meanwhile. Raises BlockingIOError where somebody does and there is no `wait` for that.
    """
    with _locked(path, wait):
        before = read(path)
        after = change(before)
        if after != before:
            _write(path, after)
        return after


def _write(path: Path, content: bytes) -> None:
    try:
        replace(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        _warn(str(path.parent), error.strerror)


def replace(path: Path, content: bytes) -> None:
    """Write a file in the place of what was there, all or nothing, for everybody to read."""
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    """Alone with an entry, as far as its folder allows."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = stack.enter_context(open(f"{path}.lock", "ab"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                for left in path.parent.glob(f"{path.name}*.tmp"):  # by a process that was killed as it wrote
                    left.unlink()
        except BlockingIOError:
            raise
        except OSError as error:
            _warn(str(path.parent), error.strerror)
        yield


_warned: set[str] = set()


def _warn(folder: str, reason: str | None) -> None:
    """Say once for each folder what it lacks."""
    if folder in _warned:
        return
    _warned.add(folder)
    message = f"nothing can be kept in {folder}: {reason}; each process makes its own. "
    warnings.warn(message + "REGNET_FAST_CACHE names another folder", CacheWarning, stacklevel=5)
