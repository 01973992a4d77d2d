"""A SQLite VFS for tests that fails on demand and can lose what was not synced (sqlite.org/vfs.html).

It is registered through ctypes in the library that Python's sqlite3 uses, so the code under test opens files as usual.
Writes go to the real files, like the page cache of a machine; what a sync has confirmed is kept separately. `kill`
leaves the files as they are, `cut` turns them into what a power cut could have left.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from random import Random
from typing import Any, Final

#: SQLite's codes (sqlite3.h).
OK, FULL, IOERR_FSYNC = 0, 13, 1034
#: Bytes that a disk writes whole or not at all.
SECTOR: Final = 512

#: Those with a file that is open yet: when a broken test leaves a connection behind, SQLite calls them at its end.
_OPEN: Final[list[FaultyDisk]] = []

_Close = CFUNCTYPE(c_int, c_void_p)
_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)
#: The name as a pointer: SQLite keeps it, and reads more behind it.
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)


class _Methods(Structure):
    """`sqlite3_io_methods`, of which these are replaced."""

    _fields_ = (
        ("version", c_int),
        ("close", _Close),
        ("read", c_void_p),
        ("write", _Write),
        ("truncate", _Truncate),
        ("sync", _Sync),
        ("others", c_void_p * 13),
    )


class _Vfs(Structure):
    """`sqlite3_vfs`, of which these are replaced."""

    _fields_ = (
        ("version", c_int),
        ("file_size", c_int),
        ("longest_path", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", _Open),
        ("delete", _Delete),
        ("others", c_void_p * 16),
    )


class _File:
    """One file: what is on the platter (None: not even its name), and what was written since, in order."""

    def __init__(self, content: bytes | None) -> None:
        self.synced = None if content is None else bytearray(content)
        self.written: list[tuple[int, bytes | None]] = []  # where and what; None: truncated to there

    def left(self, random: Random, survives: float) -> bytes | None:
        """What a power cut could leave. `survives`: the probability for each sector that was written since."""
        if self.synced is None and random.random() >= survives:
            return None
        content = bytearray(self.synced or b"")
        for at, data in self.written:
            if data is None:
                if random.random() < survives:
                    del content[at:]
                continue
            for start in range(0, len(data), SECTOR):
                if random.random() < survives:
                    _put(content, at + start, data[start : start + SECTOR])
        return bytes(content)

    def sync(self) -> None:
        """All of it is on the platter."""
        if self.synced is None:
            self.synced = bytearray()
        for at, data in self.written:
            if data is None:
                del self.synced[at:]
            else:
                _put(self.synced, at, data)
        self.written.clear()


class FaultyDisk:
    """SQLite's disk below a folder, from `install` to `remove`.

    Attributes:
        full: the probability that a write fails.
        deaf: the probability that a sync fails; what was written stays written, and is not on the platter.
    """

    def __init__(self, folder: Path, random: Random) -> None:
        self.full = self.deaf = 0.0
        self._folder, self._random = str(folder.resolve()), random
        self._dead = False
        self._files: dict[str, _File] = {}
        self._deleted_files: dict[str, _File] = {}
        self._open_files: dict[int, str] = {}
        self._nameless: set[str] = set()
        self._kept: list[Any] = []  # what C has a pointer to
        self._wrapped: dict[int, _Methods] = {}
        self._lib = _library()
        find = self._lib.sqlite3_vfs_find
        find.restype, find.argtypes = POINTER(_Vfs), [c_char_p]
        self._real = find(None).contents
        self._vfs = _Vfs.from_buffer_copy(self._real)
        self._vfs.name = b"faulty"
        self._vfs.open = _Open(self._opened)
        self._vfs.delete = _Delete(self._deleted)

    def install(self) -> None:
        """New connections are on this disk."""
        assert self._lib.sqlite3_vfs_register(ctypes.byref(self._vfs), 1) == OK

    def remove(self) -> None:
        """New connections are on the real disk."""
        self._lib.sqlite3_vfs_register(ctypes.byref(self._real), 1)
        self._lib.sqlite3_vfs_unregister(ctypes.byref(self._vfs))
        self._dead = True
        if self._open_files:
            _OPEN.append(self)

    def kill(self) -> None:
        """The process is gone: what it still does to its files, as when it closes them, does not happen."""
        self._dead = True

    def start(self) -> None:
        """Another process: writes are done again."""
        self._dead = False

    def cut(self) -> None:
        """After `kill`: the files are what a power cut could have left."""
        survives = self._random.choice((0.0, 1.0, self._random.random()))
        for path, deleted in self._deleted_files.items():
            if path not in self._files and self._random.random() < 0.5:
                self._files[path] = deleted
        self._deleted_files.clear()
        for path, file in self._files.items():
            if path in self._nameless:
                continue
            content = file.left(self._random, survives)
            if content is None:
                Path(path).unlink(missing_ok=True)
            else:
                Path(path).write_bytes(content)
        for index in Path(self._folder).glob("*-shm"):
            index.unlink()
        self._files.clear()

    def unlink(self, path: Path) -> None:
        """Somebody removes a file, which may be open: it lives on without a name, until it is closed."""
        path.unlink(missing_ok=True)
        file = self._files.pop(str(path), None)
        if file is not None:
            nameless = f"{path}, removed {len(self._nameless)}"
            self._nameless.add(nameless)
            self._files[nameless] = file
            self._open_files = {
                handle: nameless if name == str(path) else name for handle, name in self._open_files.items()
            }

    def forget(self) -> None:
        """The files were changed by somebody else: what is there is on the platter."""
        self._files.clear()

    # -- what SQLite calls ---------------------------------------------------------------------------------------

    def _opened(self, _: int, name: int | None, file: int, flags: int, out: int) -> int:
        path = None if name is None else Path(ctypes.string_at(name).decode())
        known = path is None or str(path) in self._files
        before = path.read_bytes() if path is not None and not known and path.exists() else None
        code: int = self._real.open(ctypes.addressof(self._vfs), name, file, flags, out)
        if code == OK and path is not None and str(path).startswith(self._folder):
            self._open_files[file] = str(path)
            self._files.setdefault(str(path), _File(before))
            pointer = ctypes.cast(file, POINTER(c_void_p))
            assert pointer[0] is not None
            pointer[0] = ctypes.addressof(self._methods(pointer[0]))
        return code

    def _methods(self, address: int) -> _Methods:
        if address not in self._wrapped:
            real = _Methods.from_address(address)
            methods = _Methods.from_buffer_copy(real)
            self._kept.append(real)
            methods.close = _Close(lambda file: self._closed(real, file))
            methods.write = _Write(lambda *call: self._write(real, *call))
            methods.truncate = _Truncate(lambda *call: self._truncate(real, *call))
            methods.sync = _Sync(lambda file, _: self._sync(file))
            self._wrapped[address] = methods
        return self._wrapped[address]

    def _closed(self, real: _Methods, file: int) -> int:
        self._open_files.pop(file, None)
        return int(real.close(file))

    def _write(self, real: _Methods, file: int, data: int, size: int, at: int) -> int:
        if self._dead:
            return OK
        if self.full and self._random.random() < self.full:
            return FULL
        self._of(file).written.append((at, ctypes.string_at(data, size)))
        return int(real.write(file, data, size, at))

    def _truncate(self, real: _Methods, file: int, size: int) -> int:
        if self._dead:
            return OK
        self._of(file).written.append((size, None))
        return int(real.truncate(file, size))

    def _sync(self, file: int) -> int:
        if self._dead:
            return OK
        if self.deaf and self._random.random() < self.deaf:
            return IOERR_FSYNC
        self._of(file).sync()
        self._deleted_files.clear()  # a journaling file system commits its names with the first sync of any file
        return OK

    def _of(self, file: int) -> _File:
        return self._files[self._open_files[file]]

    def _deleted(self, _: int, name: bytes, sync_folder: int) -> int:
        path = name.decode()
        if not path.startswith(self._folder):
            return int(self._real.delete(ctypes.addressof(self._vfs), name, sync_folder))
        if self._dead:
            return OK
        if (file := self._files.pop(path, None)) is not None:
            self._deleted_files[path] = file
        return int(self._real.delete(ctypes.addressof(self._vfs), name, sync_folder))


def _put(content: bytearray, at: int, data: bytes) -> None:
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def _library() -> ctypes.CDLL:
    """SQLite as this Python's sqlite3 has it, whether it is linked or built into it."""
    import _sqlite3

    return ctypes.CDLL(_sqlite3.__file__)
