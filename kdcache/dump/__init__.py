"""One pass of a teacher over the structures of a store, its features written beside them.

`pipeline` holds the order of events, `compute` what a teacher is asked, `workers` and `parts` how
several processes share the shards.
"""

from kdcache.dump.opening import open_or_import
from kdcache.dump.options import DumpOptions, DumpReport, Part, TeacherSource, choose_fields
from kdcache.dump.pipeline import dump_teacher

__all__ = [
    "DumpOptions",
    "DumpReport",
    "Part",
    "TeacherSource",
    "choose_fields",
    "dump_teacher",
    "open_or_import",
]
