"""Structures out of files: extended XYZ, ASE, npz, HDF5, Parquet, LMDB and stores.

Owns formats, keys and units; what becomes of the structures is the caller's.
Invariant: every structure that leaves here is checked, in eV, Å and eV/Å, and named.
"""

from kdcache.readers.dataset import Dataset, read_structures
from kdcache.readers.interface import Reader, ReadOptions
from kdcache.readers.labels import LabelKeys

__all__ = ["Dataset", "LabelKeys", "ReadOptions", "Reader", "read_structures"]
