"""GemNet-OC: messages between edges over triplets and quadruplets, in the Open Catalyst variant.

`model` walks through the layers; `paths` finds which edges meet, `bases` turns distances and angles
into numbers, `mixing` sums over paths, `interactions` and `blocks` are the layers.
"""

from kdcache.models.gemnet_oc.hyperparameters import GemNetOCHyperparameters
from kdcache.models.gemnet_oc.model import GemNetOC

__all__ = ["GemNetOC", "GemNetOCHyperparameters"]
