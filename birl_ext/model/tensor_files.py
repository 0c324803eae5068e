"""Tensors in files that may come from strangers: .npz and .safetensors, never pickle.

Nothing in a file is believed before it is bounded: member names come from a list, declared sizes
are capped and must agree with the headers, and no byte beyond them is read.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from io import BufferedIOBase
from pathlib import Path
from types import ModuleType
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from birl_ext.errors import BirlError, FileFormatError, MissingDependencyError
from birl_ext.files import replacing

__all__ = ["FOREIGN", "MAX_BYTES", "read_tensors", "write_tensors"]

MAX_BYTES = 2**34
"""Default cap on the decompressed size of a file: 16 GiB."""

_MAX_HEADER = 1024
# Deflate reaches 1032; probabilities seldom pass 100 unless nearly all are zero.
_MAX_RATIO = 500
_NPY_HEADER = re.compile(
    rb"\{'descr': '(<f4|<f8|<f2|<i8|<i4|\|b1)', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n"
)
_SUFFIXES = (".npz", ".safetensors")
FOREIGN = (
    "write it again with save(); of another program's file, load the arrays with that program and "
    "build DenseMDP(reward, transition, discount) or SparseMDP of them"
)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to `path`; the extension decides the format.

    The file appears complete or not at all: it is written beside its place and renamed.

    Raises:
        FileFormatError: the extension is neither .npz nor .safetensors.
        MissingDependencyError: .safetensors without the package.
    """
    target = Path(path)
    suffix = _suffix(target, "choose a name that ends in .npz")
    package = _safetensors() if suffix == ".safetensors" else None
    # Copies: safetensors refuses views of one storage, such as a reward that is also the reference.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(target) as draft, draft.open("xb") as file:
        if package is not None:
            file.write(package.torch.save(copies))
        else:
            _write_npz(file, copies)


def read_tensors(
    path: str | os.PathLike[str], names: Collection[str], *, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """Read a file written by `write_tensors`, or by anyone else.

    Args:
        path: a .npz or .safetensors file.
        names: the only member names allowed.
        max_bytes: most bytes that the tensors may take together.

    Raises:
        FileFormatError: missing, truncated, oversized, or not of the expected form.
        MissingDependencyError: .safetensors without the package.
    """
    source = Path(path)
    suffix = _suffix(source, FOREIGN)
    if not source.is_file():
        raise FileFormatError(f"{source} is not a file", fix="check the path")
    read = _read_npz if suffix == ".npz" else _read_safetensors
    try:
        return read(source, frozenset(names), max_bytes)
    except BirlError:
        raise
    except Exception as error:
        raise _malformed(source, f"cannot be read: {error}") from error


def _write_npz(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """What numpy.savez writes, with a fixed date: the same tensors make the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, tensor.numpy(), allow_pickle=False)


def _read_npz(path: Path, names: frozenset[str], max_bytes: int) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > len(names):
            raise _malformed(path, f"has {len(members)} members", f"at most {len(names)}")
        total = 0
        for member in members:
            stem = member.filename.removesuffix(".npy")
            if stem == member.filename or stem not in names:
                raise _unknown_member(path, member.filename, names)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _malformed(path, f"member {stem} has compression {member.compress_type}")
            if member.file_size > _MAX_RATIO * max(member.compress_size, 1):
                raise _malformed(
                    path,
                    f"member {stem} expands {member.compress_size} to {member.file_size} bytes",
                    f"a ratio up to {_MAX_RATIO}",
                    fix="save it uncompressed, with numpy.savez",
                )
            total += member.file_size
        if len({member.filename for member in members}) < len(members):
            raise _malformed(path, "has two members of one name")
        _check_size(path, total, max_bytes)
        return {m.filename.removesuffix(".npy"): _read_npy(path, archive, m) for m in members}


def _read_npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    """One array, its header read by a regular expression instead of an evaluator."""
    with cast(BufferedIOBase, archive.open(member)) as stream:
        magic = stream.read(8)
        if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
            raise _malformed(path, f"member {member.filename} is not an array of version 1 or 2")
        width = "<H" if magic[6] == 1 else "<I"
        (length,) = struct.unpack(width, stream.read(struct.calcsize(width)))
        found = _NPY_HEADER.fullmatch(stream.read(min(length, _MAX_HEADER)))
        if found is None:
            raise _malformed(path, f"member {member.filename} has an unexpected header")
        dtype = np.dtype(found[1].decode())
        shape = tuple(int(size) for size in re.findall(rb"\d+", found[3]))
        size = math.prod(shape) * dtype.itemsize
        start = 8 + struct.calcsize(width) + length
        if start + size != member.file_size:
            raise _malformed(
                path,
                f"member {member.filename} declares {size} bytes of data in its header",
                f"{member.file_size - start}, what the archive holds",
            )
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = stream.readinto(view)
            if not count:
                raise _malformed(path, f"member {member.filename} ends early")
            view = view[count:]
        if stream.read(1):  # also makes zipfile compare the checksum
            raise _malformed(path, f"member {member.filename} holds more than it declares")
    array = np.frombuffer(data, dtype=dtype)
    shaped = array.reshape(shape[::-1]).T if found[2] == b"True" else array.reshape(shape)
    return torch.from_numpy(shaped).contiguous()


def _read_safetensors(path: Path, names: frozenset[str], max_bytes: int) -> dict[str, Tensor]:
    package = _safetensors()
    _check_size(path, path.stat().st_size, max_bytes)
    with package.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name not in names:
                raise _unknown_member(path, name, names)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors is not installed", fix="pip install 'birl_ext[io]', or use .npz"
        ) from error
    return safetensors


def _suffix(path: Path, fix: str) -> str:
    if path.suffix not in _SUFFIXES:
        raise FileFormatError(
            f"{path.name} has extension {path.suffix!r}", allowed=" or ".join(_SUFFIXES), fix=fix
        )
    return path.suffix


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise _malformed(
            path,
            f"holds {size} bytes",
            f"at most {max_bytes}",
            fix="raise `max_bytes` if you trust the file",
        )


def _unknown_member(path: Path, name: str, names: Collection[str]) -> FileFormatError:
    return _malformed(path, f"has a member {name[:80]!r}", ", ".join(sorted(names)))


def _malformed(path: Path, what: str, allowed: str = "", fix: str = "") -> FileFormatError:
    return FileFormatError(f"{path.name} {what}", allowed=allowed, fix=fix or FOREIGN)
