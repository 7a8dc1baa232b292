"""Means with standard errors, percentiles and shares of per-token numbers.

Tokens of one text are not independent, so the standard error of a mean is taken over runs of consecutive tokens of one
sequence (clusters): s^2 = C / (C - 1) * sum over clusters (sum of deviations)^2 / N^2 (Cameron and Miller, "A
practitioner's guide to cluster-robust inference", 2015). A run is a whole sequence, or 64 tokens of it when there are
fewer than 16 sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l4pack.evaluate.scoring import PairedScores

ENOUGH_SEQUENCES = 16
RUN_TOKENS = 64
POSITION_BUCKETS = 16
HISTOGRAM_EDGES = [10.0 ** (exponent / 4) for exponent in range(-28, 9)]  # 1e-7 to 100 nats, four a decade


def clusters(lengths: Sequence[int]) -> Tensor:
    """The cluster of every token, int64 [tokens], for sequences of `lengths` scored tokens one after another."""
    whole = len(lengths) >= ENOUGH_SEQUENCES
    parts, first = [], 0
    for length in lengths:
        runs = torch.zeros(length, dtype=torch.long) if whole else torch.arange(length) // RUN_TOKENS
        parts.append(runs + first)
        first += int(runs[-1]) + 1 if length else 0
    return torch.cat(parts)


def mean_and_error(values: Tensor, cluster: Tensor) -> tuple[float, float | None]:
    """Mean of values [tokens] and its standard error by cluster, None where one cluster is all there is."""
    mean = float(values.double().mean())
    count = int(cluster.max()) + 1
    if count < 2:
        return mean, None
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, values.double() - mean)
    return mean, math.sqrt(count / (count - 1) * float(sums.square().sum())) / len(values)


def percentile(values: Tensor, share: float) -> float:
    """The value that `share` of the values [tokens] don't exceed (nearest rank)."""
    ordered = values.sort().values
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def perplexity(log_probability: Tensor, cluster: Tensor) -> tuple[float, float | None]:
    """exp of the mean negative log-likelihood [tokens] (nats), and its standard error by the delta method."""
    mean, error = mean_and_error(-log_probability, cluster)
    value = math.exp(min(mean, 700.0))
    return value, None if error is None else value * error


def summarize(scores: PairedScores, lengths: Sequence[int], positions: Tensor) -> dict[str, Any]:
    """All paired numbers of a text: `lengths` scored tokens a sequence, and int64 [tokens] `positions` of all of
    them."""
    cluster = clusters(lengths)
    agree = (scores.reference.likeliest == scores.artifact.likeliest).double()
    reference, reference_error = perplexity(scores.reference.log_probability, cluster)
    artifact, artifact_error = perplexity(scores.artifact.log_probability, cluster)
    kl, kl_error = mean_and_error(scores.kl, cluster)
    agreement, agreement_error = mean_and_error(agree, cluster)
    ratio, ratio_error = perplexity(scores.artifact.log_probability - scores.reference.log_probability, cluster)
    return {
        "kl_mean": kl,
        "kl_standard_error": kl_error,
        "kl_median": percentile(scores.kl, 0.5),
        "kl_p90": percentile(scores.kl, 0.9),
        "kl_p99": percentile(scores.kl, 0.99),
        "kl_p999": percentile(scores.kl, 0.999),
        "kl_max": float(scores.kl.max()),
        "kl_histogram": {"edges": HISTOGRAM_EDGES, "counts": _histogram(scores.kl)},
        "top1_agreement": agreement,
        "top1_agreement_standard_error": agreement_error,
        "perplexity_reference": reference,
        "perplexity_reference_standard_error": reference_error,
        "perplexity_artifact": artifact,
        "perplexity_artifact_standard_error": artifact_error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_standard_error": ratio_error,
        "true_token_probability": _probability_change(scores),
        "by_position": _by_position(scores.kl, agree, positions, cluster),
        "tokens": len(scores.kl),
        "clusters": int(cluster.max()) + 1,
    }


def _probability_change(scores: PairedScores) -> dict[str, float]:
    change = scores.artifact.log_probability.exp() - scores.reference.log_probability.exp()
    result = {"mean": float(change.mean()), "rms": float(change.square().mean().sqrt())}
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        result[f"p{share * 100:g}".replace(".", "_")] = percentile(change, share)
    return result


def _histogram(kl: Tensor) -> list[int]:
    """Tokens below the first edge, between edges, and from the last one up."""
    place = torch.bucketize(kl, torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64), right=True)
    counts: list[int] = torch.bincount(place, minlength=len(HISTOGRAM_EDGES) + 1).tolist()
    return counts


def _by_position(kl: Tensor, agree: Tensor, positions: Tensor, cluster: Tensor) -> list[dict[str, float | None]]:
    """Means of ranges of positions, with standard errors by what each cluster has of a range."""
    width = max(1, math.ceil((int(positions.max()) + 1) / POSITION_BUCKETS))
    rows: list[dict[str, float | None]] = []
    for bucket in range(POSITION_BUCKETS):
        inside = positions // width == bucket
        if bool(inside.any()):
            parts: Tensor = torch.unique(cluster[inside], return_inverse=True)[1]
            (kl_mean, kl_error), (agreed, agreed_error) = (mean_and_error(one[inside], parts) for one in (kl, agree))
            rows.append(
                {
                    "from": bucket * width,
                    "to": (bucket + 1) * width - 1,
                    "tokens": int(inside.sum()),
                    "kl_mean": kl_mean,
                    "kl_standard_error": kl_error,
                    "top1_agreement": agreed,
                    "top1_agreement_standard_error": agreed_error,
                }
            )
    return rows
