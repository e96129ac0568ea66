"""Where a user, what it had and what it never had lie in embedding space, before and after forgetting."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.compat.imports import import_tsne
from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.devices import array
from recbole_unlearn.storage.triple_log import TripleLog

RECENT = 10  # epochs, at most, whose negatives stand for all: later ones are what the final weights answer to
POSITIVES = 3  # of a user in its map, as in the paper
NEGATIVES = 15  # a positive in the map

Pair = tuple[np.ndarray, np.ndarray]  # embeddings of users and items


def embeddings(model: AbstractRecommender) -> Pair | None:
    """User and item embeddings of a model, float32 ``[users, K]`` and ``[items, K]``; None if it has no such pair.

    Those that it scores by: of a graph model the propagated ones, of RecEraser's ensemble the aggregated ones. An
    ensemble that averages scores has none; the mean over the shards that have a user, or an item, stands for them.
    """
    if hasattr(model, "restore_user_e"):
        clear_caches(model)
        with torch.no_grad():
            model.eval().full_sort_predict({model.USER_ID: torch.ones(1, dtype=torch.int64, device=model.device)})
        pair = [model.restore_user_e, model.restore_item_e]
        clear_caches(model)
    elif hasattr(model, "user_in"):
        tables = (model.user, model.user_in), (model.item, model.item_in)
        pair = [table.sum(1) / present.sum(1, keepdim=True).clamp(min=1) for table, present in tables]
    else:
        state = model.state_dict()
        pair = [state.get(f"{kind}_embedding.weight") for kind in ("user", "item")]
    if any(each is None or each.ndim != 2 for each in pair) or pair[0].shape[1] != pair[1].shape[1]:
        return None
    return array(pair[0]), array(pair[1])


def weight_distance(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """l2 distance of two models' embeddings, ``((P, Q), (P, Q))`` (UBPR, Figure 6).

    Between models of the same initialisation: rotating P and Q together changes no score, but the distance. Where
    order or negatives of the training differ, it holds the noise of training too; `again.train_paired` shares both.
    """
    return float(np.sqrt(sum(np.sum((a.astype(np.float64) - b) ** 2) for a, b in zip(first, second, strict=True))))


def models_distance(first: AbstractRecommender, second: AbstractRecommender) -> float | None:
    """`weight_distance` of two RecBole models or ensembles; None where one has no `embeddings`."""
    own, other = embeddings(first), embeddings(second)
    return None if own is None or other is None else weight_distance(own, other)


def turned(first: Pair, second: Pair) -> Pair:
    """The first pair of embeddings, both mapped by the orthogonal matrix that brings them nearest to the second.

    Scores are inner products: such a map changes none of them (orthogonal Procrustes).

    Returns:
        Both, float64.
    """
    own, other = (np.concatenate(pair).astype(np.float64) for pair in (first, second))
    left, _, right = np.linalg.svd(own.T @ other)
    own = own @ (left @ right)
    return own[: len(first[0])], own[len(first[0]) :]


def scores(pair: Pair, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Scores of pairs of users and items by embeddings, float64 ``[n]``."""
    P, Q = pair
    return np.einsum("nk,nk->n", P[users], Q[items], dtype=np.float64)


def pnpr(P: np.ndarray, Q: np.ndarray, users: np.ndarray, items: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Positive-negative proximity ratio (UBPR, Figure 5) of pairs: mean distance to negatives over that to the item.

    Above 1: the user is nearer to the item than to what it never had; about 1: no difference.

    Args:
        users, items: ``[n]``.
        negatives: ``[n, m]``.

    Returns:
        float64 ``[n]``.
    """
    user = P[users].astype(np.float64)
    near = np.linalg.norm(user - Q[items], axis=1)
    far = np.linalg.norm(user[:, None] - Q[negatives], axis=2).mean(1)
    return far / np.maximum(near, np.finfo(np.float32).tiny)


def by_user(users: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of the values of each user, in the order of the user ids."""
    _, place = np.unique(users, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)


def tsne_map(P: np.ndarray, Q: np.ndarray, user: int, items: np.ndarray, negatives: np.ndarray) -> dict[str, list]:
    """Two-dimensional map of a user, items and negatives by t-SNE, scaled to the unit square.

    A map shows who is near whom; where, how large, and how two maps lie to each other mean nothing.

    Args:
        user: id.
        items, negatives: ids, ``[n]`` and ``[m]``.

    Returns:
        Rounded: ``user`` [x, y], ``positives`` ``[n, 2]``, ``negatives`` ``[m, 2]``.
    """
    points = np.concatenate([P[[user]], Q[items], Q[negatives]]).astype(np.float64)
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = import_tsne()(perplexity=perplexity, init="pca", method="exact", random_state=0)
    places = tsne.fit_transform(points / (points.std() or 1.0))
    middle = (places.min(0) + places.max(0)) / 2
    places = 0.5 + (places - middle) / (np.ptp(places, axis=0).max() or 1.0)
    places = np.round(places, 4).tolist()
    return {"user": places[0], "positives": places[1 : 1 + len(items)], "negatives": places[1 + len(items) :]}


def geometry(
    models: Mapping[str, AbstractRecommender],
    log: TripleLog,
    rows: np.ndarray,
    epochs: int,
    mapped: bool = True,
) -> dict[str, Any]:
    """PNPR of every user that loses something, and a map of the one that loses most, without saying who is who.

    Args:
        models: name -> RecBole model.
        log: of the original's training; its negatives are those that the forgotten rows met.
        rows: of the log, the forgotten ones, sorted.
        epochs: epochs that the original's weights were trained for.
        mapped: whether there is a map; it takes a second, most of which is scikit-learn's import.

    Returns:
        dict of plain values, for `pictures.described`: ``pnpr`` (model -> one value a user, users in random order) and
        ``map`` (model -> `tsne_map`, of those that have one); empty where models have no embeddings or no negatives,
        or nothing is forgotten.
    """
    pairs = {name: pair for name, model in models.items() if (pair := embeddings(model)) is not None}
    if len(rows) == 0 or len(pairs) < len(models) or not log.negatives:
        return {}
    users, items = np.asarray(log.users, np.int64)[rows], np.asarray(log.items, np.int64)[rows]
    recent = np.arange(max(epochs - RECENT, 0), epochs)
    negatives = np.concatenate(list(log.gather(rows, recent)), axis=1).astype(np.int64)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(np.unique(users)))  # the order of ids would help to tell who is who
    ids, counts = np.unique(users, return_counts=True)
    own = np.flatnonzero(users == ids[counts.argmax()])
    own = rng.choice(own, min(POSITIVES, len(own)), replace=False)
    others = np.unique(negatives[own, :NEGATIVES])
    others = np.setdiff1d(others, items[own])
    ratios, maps = {}, {}
    for name, (P, Q) in pairs.items():
        ratios[name] = np.round(by_user(users, pnpr(P, Q, users, items, negatives))[order], 4).tolist()
        if mapped and len(others) > 1 and P.shape[1] > 1:  # one dimension has no map
            maps[name] = tsne_map(P, Q, int(users[own[0]]), items[own], others)
    return {"pnpr": ratios, "map": maps}
