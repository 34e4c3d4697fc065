"""A detector of objects in one stage, with the options of GSO-YOLO (arXiv 2407.00906) as its settings.

``boxes.py`` has the forms of boxes and the losses of matched ones. ``modules.py`` has the parts of the network,
``network.py`` puts them together. ``suppression.py`` makes detections of what the network says of its cells.
"""
