"""Stores as files of other programs, and teachers that other programs ran.

`selection` says what is taken out of a store and in which order, each format has a module of its
own, `labelled_file` reads what another program labelled, `labelled` makes a store with a teacher of
it. Runs without torch.
"""

from kdcache.interchange.extxyz import write_extxyz
from kdcache.interchange.labelled import LabelledOptions, import_labelled
from kdcache.interchange.nvalchemi import write_nvalchemi
from kdcache.interchange.parquet import write_parquet
from kdcache.interchange.selection import Selection, select

__all__ = [
    "LabelledOptions",
    "Selection",
    "import_labelled",
    "select",
    "write_extxyz",
    "write_nvalchemi",
    "write_parquet",
]
