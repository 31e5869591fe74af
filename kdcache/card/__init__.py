"""A page about a store for people, and a description of it for search engines of datasets.

`sample` reads a bounded part of the store, `plots` draws it, `page` writes the HTML, `croissant`
the JSON-LD. Runs without torch.
"""

from kdcache.card.croissant import write_croissant
from kdcache.card.page import write_card

__all__ = ["write_card", "write_croissant"]
