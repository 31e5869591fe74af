"""Contracts made executable: three lines of test for a teacher, a model or a reader of your own."""

from kdcache.testing.checks import (
    check_reader,
    check_student,
    check_teacher,
    sample_structures,
)

__all__ = ["check_reader", "check_student", "check_teacher", "sample_structures"]
