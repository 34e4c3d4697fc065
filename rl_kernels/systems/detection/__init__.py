"""A detector of objects in one stage, with the options of GSO-YOLO (arXiv 2407.00906) as its settings.

``boxes.py`` has the forms of boxes and the losses of matched ones; ``suppression.py`` makes detections of what a
network says of its cells.
"""
