"""The store: a dataset's structures and its teachers' features on disk.

FORMAT.md beside this file says what every byte means. Runs on numpy, without torch.
"""

from kdcache.store.create import add_teacher, create_store
from kdcache.store.entries import (
    DatasetEntry,
    FieldEntry,
    FieldError,
    GraphEntry,
    Licences,
    TeacherEntry,
)
from kdcache.store.index import StoreIndex, index_from_plan, read_index
from kdcache.store.inspect import describe_store, format_description
from kdcache.store.layout import BlockPlan, plan_blocks
from kdcache.store.manifest import FORMAT_VERSION, Manifest, read_manifest
from kdcache.store.reader import Store, is_store, open_store
from kdcache.store.verify import VerifyReport, verify_store
from kdcache.store.work import StoreLock
from kdcache.store.writer import GroupWriter

__all__ = [
    "FORMAT_VERSION",
    "BlockPlan",
    "DatasetEntry",
    "FieldEntry",
    "FieldError",
    "GraphEntry",
    "GroupWriter",
    "Licences",
    "Manifest",
    "Store",
    "StoreIndex",
    "StoreLock",
    "TeacherEntry",
    "VerifyReport",
    "add_teacher",
    "create_store",
    "describe_store",
    "format_description",
    "index_from_plan",
    "is_store",
    "open_store",
    "plan_blocks",
    "read_index",
    "read_manifest",
    "verify_store",
]
