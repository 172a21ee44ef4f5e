"""EROFS as our writer makes it: the on-disk structures, the check before `mount(2)`, and a reader.

Pure: a read function comes in, values go out. Called by the converter (its writer uses the structures, its
merged view of lower layers the reader), by whoever mounts and whoever serves what the kernel reads
(`check_superblock_of`), by the file-level FUSE mount and by `check`.

This is a strict subset of the kernel's format (fs/erofs/erofs_fs.h): 4 KiB blocks, uncompressed, extended
64-byte inodes, layouts "flat plain" and "flat inline", inline xattrs. docs/format.md has the conventions.
Everything else is refused with InvalidInputError naming the field and where it lies.
"""

from __future__ import annotations

from imagefs.erofs.ondisk import Superblock, check_superblock, check_superblock_of
from imagefs.erofs.reader import DirEntry, Inode, Reader

__all__ = ["DirEntry", "Inode", "Reader", "Superblock", "check_superblock", "check_superblock_of"]
