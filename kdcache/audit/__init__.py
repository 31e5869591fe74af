"""Whether what a store keeps of a teacher is what the teacher says, by a sample of structures.

`pipeline` holds the order of events, `sample` what is stored, `difference` how far it is from what
is computed, `symmetry` what turning and moving atoms must do.
"""

from kdcache.audit.pipeline import AuditOptions, audit_store
from kdcache.audit.report import AuditReport, FieldAudit

__all__ = ["AuditOptions", "AuditReport", "FieldAudit", "audit_store"]
