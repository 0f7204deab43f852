"""Spherical k-means: clusters of directions.

N points, D their width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raybd import pulse

_CHUNK = 16_384  # points at a time: a row of N by K similarities would not fit for all of them


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    Attributes:
        centroids_KD: of unit length.
        labels_N: nearest centroid of each point; the first of equal ones.
        similarity: mean cosine of points to their centroids, after each assignment; it never falls.
    """

    centroids_KD: Tensor
    labels_N: Tensor
    similarity: list[float]


@torch.no_grad()
def spherical_kmeans(points_ND: Tensor, clusters: int, *, iterations: int, seed: int) -> Clusters:
    """Cluster unit vectors by cosine: assign to the nearest centroid, make each the direction of its points' sum.

    Starts from `clusters` points drawn at random, and ends early when no point changes its cluster. A cluster that
    lost all its points starts again at the point that lies farthest from its own centroid (the next farthest for the
    next empty cluster). Sums are matrix products, in one order: equal input on one device gives equal bits.

    Args:
        points_ND: float32, L2-normalised.
        iterations: assignments after the first.

    Errors: ValueError where there are fewer points than clusters.

    Source: arXiv 1807.05520 (deep clustering); Dhillon and Modha 2001 (spherical k-means).
    """
    if clusters > len(points_ND):
        raise ValueError(f"{clusters} clusters of {len(points_ND)} points")
    draw = torch.randperm(len(points_ND), generator=torch.Generator().manual_seed(seed))[:clusters]
    centroids_KD = points_ND[draw.to(points_ND.device)]
    labels_N, nearness_N = _assign(points_ND, centroids_KD)
    similarity = [float(nearness_N.double().mean())]
    for _ in range(iterations):
        pulse.beat()
        centroids_KD = _centroids(points_ND, labels_N, nearness_N, centroids_KD)
        before_N = labels_N
        labels_N, nearness_N = _assign(points_ND, centroids_KD)
        similarity.append(float(nearness_N.double().mean()))
        if torch.equal(labels_N, before_N):
            break
    return Clusters(centroids_KD, labels_N, similarity)


def _assign(points_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's nearest centroid and its cosine to it."""
    found = [(part @ centroids_KD.T).max(dim=1) for part in points_ND.split(_CHUNK)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def _centroids(points_ND: Tensor, labels_N: Tensor, nearness_N: Tensor, before_KD: Tensor) -> Tensor:
    clusters = len(before_KD)
    sums_KD = torch.zeros_like(before_KD)
    for points, labels in zip(points_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True):
        # A product with the one-hot labels: scattered additions on a GPU come in any order.
        sums_KD += F.one_hot(labels, clusters).to(points.dtype).T @ points
    counts_K = torch.bincount(labels_N, minlength=clusters)
    lengths_K1 = sums_KD.norm(dim=1, keepdim=True)
    # Points that cancel out have no direction: their centroid stays.
    centroids_KD = torch.where(lengths_K1 > 1e-6, sums_KD / lengths_K1.clamp_min(1e-6), before_KD)
    empty = (counts_K == 0).nonzero().flatten()
    if len(empty):
        farthest = torch.sort(nearness_N, stable=True).indices[: len(empty)]
        centroids_KD[empty] = points_ND[farthest]
    return centroids_KD
