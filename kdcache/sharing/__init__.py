"""Stores between places: published, pulled, packed, whole or in part.

Runs on numpy and obstore, without torch.
"""

from kdcache.sharing.moving import publish_rows, publish_store, pull_store
from kdcache.sharing.packing import pack_store
from kdcache.sharing.rows import Cost, Selection, select_rows
from kdcache.sharing.transfer import DEFAULT_JOBS, Report

__all__ = [
    "DEFAULT_JOBS",
    "Cost",
    "Report",
    "Selection",
    "pack_store",
    "publish_rows",
    "publish_store",
    "pull_store",
    "select_rows",
]
