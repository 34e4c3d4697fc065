"""How much of the classes can be read, by a linear classifier, from what each module returns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rl_kernels.systems.contract import Batches
from rl_kernels.systems.local.heads import Pool
from rl_kernels.systems.local.network import LocalNetwork


@torch.no_grad()
def probe(net: LocalNetwork, data: Callable[[bool], Batches]) -> list[float]:
    """Fit a logistic regression to the pooled output of each module but the last, and count.

    Args:
        net: trained.
        data: images and labels, of training (True) or test.

    Returns:
        Accuracies on test images; the last is the network's own.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net.eval()
    pool = Pool(net.first_token)
    (fitted, labels), (tested, wanted) = (_collected(net, pool, data(training)) for training in (True, False))
    found = []
    for features, others in zip(fitted[:-1], tested[:-1], strict=True):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        classifier.fit(features, labels)
        found.append(float(classifier.score(others, wanted)))
    return [*found, float((tested[-1].argmax(1) == wanted).mean())]


def _collected(net: LocalNetwork, pool: Pool, batches: Batches) -> tuple[list[np.ndarray], np.ndarray]:
    """The pooled output of every module, the last one's whole, and the labels."""
    rows: list[list[np.ndarray]] = []
    labels = []
    for images, targets in batches:
        outputs = list(net.features(images))
        rows.append([*(pool(each).float().cpu().numpy() for each in outputs[:-1]), outputs[-1].float().cpu().numpy()])
        labels.append(targets.cpu().numpy())
    return [np.concatenate(each) for each in zip(*rows, strict=True)], np.concatenate(labels)
