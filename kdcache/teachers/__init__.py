"""Teachers: what a dump asks of a model, and the models that can answer."""

from kdcache.teachers.interface import Teacher, TeacherLoader
from kdcache.teachers.load import load_teacher
from kdcache.teachers.native import NativeTeacher, load_native
from kdcache.teachers.open_catalyst import read_open_catalyst, save_open_catalyst

__all__ = [
    "NativeTeacher",
    "Teacher",
    "TeacherLoader",
    "load_native",
    "load_teacher",
    "read_open_catalyst",
    "save_open_catalyst",
]
