"""RecBole tokens, as users write them, to the ids that a split uses."""

import difflib

import numpy as np

from recbole_unlearn.input_error import InputError


def ids(split, field, tokens):
    """Ids of user (``field='user'``) or item tokens, int64 ``[tokens]``; InputError for one that the data set lacks."""
    data = split.train._dataset
    known = data.field2token_id[data.uid_field if field == "user" else data.iid_field]
    known = {token: i for token, i in known.items() if i != 0}
    unknown = [token for token in tokens if token not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        hint = nearest(unknown[0], known)
        raise InputError(f"unknown {field} token {unknown[0]!r}{more} in data set {data.dataset_name!r}{hint}")
    return np.array([known[token] for token in tokens], dtype=np.int64)


def nearest(token, known):
    """Text that names the known token most like one that is not known, or nothing."""
    near = difflib.get_close_matches(token, list(known)[:100_000], n=1)
    return f"; did you mean {str(near[0])!r}?" if near and near[0] != token else ""
