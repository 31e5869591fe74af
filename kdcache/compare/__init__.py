"""How alike the layers of two models are: CKA of stores and runs, as a table and as a picture."""

from kdcache.compare.heatmap import draw
from kdcache.compare.pipeline import Comparison, Pair, compare_layers, write_csv

__all__ = ["Comparison", "Pair", "compare_layers", "draw", "write_csv"]
