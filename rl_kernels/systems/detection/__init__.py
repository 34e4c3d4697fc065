"""A detector of objects in one stage, with the options of GSO-YOLO (arXiv 2407.00906) as its settings.

``boxes.py`` has the forms of boxes and the losses of matched ones. ``modules.py`` has the parts of the network,
``network.py`` puts them together. ``assigning.py`` says which cells learn which box, ``losses.py`` what a batch is
trained by. ``suppression.py`` makes detections of what the network says of its cells, which ``scoring.py`` scores.

``data.py`` has data sets by their names and makes batches of them; ``images.py`` says what a set is. ``trees.py`` and
``scenes.py`` make two of packages that are installed, ``folders.py`` reads users'. ``transforms.py`` brings images to a
square, and changes them in training.

The network is YOLOv8's as publicly documented. Of GSO-YOLO the paper's text could not be read: that it adds GAM, a
module that smooths by moving averages, and a loss of CIoU and EIoU, is known at second hand; how, is an option here,
and none is claimed to be the paper's.
"""

from rl_kernels.systems.detection.assigning import Targets, TaskAligned, batch_targets
from rl_kernels.systems.detection.boxes import BOX_LOSSES, BoxLoss, box_loss
from rl_kernels.systems.detection.data import BoxPictures, load, scored, targets_of
from rl_kernels.systems.detection.images import BoxImages, BoxSet
from rl_kernels.systems.detection.losses import DetectionLoss, Losses
from rl_kernels.systems.detection.modules import SCM, SCMS
from rl_kernels.systems.detection.network import SCALES, Detector, Gom, Predictions, predictions
from rl_kernels.systems.detection.scoring import Scorer, Scores, precision_recall_picture
from rl_kernels.systems.detection.suppression import Detections, describe_suppression, detections
from rl_kernels.systems.detection.transforms import Augmentation

__all__ = [
    "Detector",
    "SCALES",
    "SCMS",
    "SCM",
    "Gom",
    "Predictions",
    "predictions",
    "Targets",
    "batch_targets",
    "TaskAligned",
    "DetectionLoss",
    "Losses",
    "BOX_LOSSES",
    "BoxLoss",
    "box_loss",
    "Detections",
    "detections",
    "describe_suppression",
    "load",
    "BoxImages",
    "BoxSet",
    "BoxPictures",
    "Augmentation",
    "targets_of",
    "scored",
    "Scorer",
    "Scores",
    "precision_recall_picture",
]
