"""New structures out of old ones, labelled by a teacher into a store of their own."""

from kdcache.augment.options import METHODS, AugmentOptions
from kdcache.augment.overlay import augment, same_teacher

__all__ = ["METHODS", "AugmentOptions", "augment", "same_teacher"]
