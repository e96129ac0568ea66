"""A knowledge graph beside interactions as they are, so that models with and without one share a split."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from recbole.data.dataset import Dataset, KnowledgeBasedDataset

from recbole_unlearn.errors import InputError

KEY = "linked_knowledge"  # of the configuration: checksum of the graph; set where all items are to be kept
FILES = ("kg", "link")


class LinkedDataset(KnowledgeBasedDataset):
    """RecBole's ``KnowledgeBasedDataset`` with all interactions, and items numbered as without a knowledge graph.

    RecBole's own drops the interactions of items that no entity is linked to, and moves the other items to the end
    of the ids. Here an item without a link is an entity without facts.
    """

    def _filter_link(self):
        interactions, self.inter_feat = self.inter_feat, self.inter_feat.copy()
        super()._filter_link()
        self.inter_feat = interactions

    def _merge_item_and_entity(self):
        """Give linked entities the ids of their items, and the others ids above those of items."""
        items = self.field2id_token[self.iid_field]
        entities = self.field2id_token[self.head_entity_field]
        item_ids = self.field2token_id[self.iid_field]
        linked = np.array([entity in self.entity2item for entity in entities])
        apart = ~linked
        apart[0] = False  # padding keeps id 0
        ids = np.zeros(len(entities), np.int64)
        ids[linked] = [item_ids[self.entity2item[entity]] for entity in entities[linked]]
        ids[apart] = len(items) + np.arange(apart.sum())
        tokens = np.concatenate([[self.item2entity.get(item, item) for item in items], entities[apart]])
        token_ids = {token: n for n, token in enumerate(tokens)}
        for field in self.alias["entity_id"]:
            self._reset_ent_remapID(field, ids, tokens, token_ids)
        self.field2id_token[self.entity_field], self.field2token_id[self.entity_field] = tokens, token_ids


def own_entities(data: Dataset, items: Iterable[str]) -> np.ndarray:
    """Ids of the entities that are linked to some items, by token, and to no other ones; none without a graph."""
    links, items = getattr(data, "item2entity", {}), set(items)
    kept = {entity for item, entity in links.items() if item not in items}
    found = {entity for item, entity in links.items() if item in items} - kept
    ids = data.field2token_id[data.entity_field] if found else {}
    return np.array(sorted(ids[entity] for entity in found if entity in ids), np.int64)


def drop_facts(data: KnowledgeBasedDataset, entities: np.ndarray) -> None:
    """Take a graph's triples of some entities away, in place."""
    ends = (data.kg_feat[field].numpy() for field in (data.head_entity_field, data.tail_entity_field))
    gone = np.logical_or.reduce([np.isin(ids, entities) for ids in ends])
    data.kg_feat = data.kg_feat[torch.from_numpy(np.flatnonzero(~gone))]


def checksum(folder: Path | str, name: str) -> str:
    """sha256 over the ``.kg`` and ``.link`` files of a data set.

    Raises:
        InputError: one of them is missing.
    """
    result = hashlib.sha256()
    for ending in FILES:
        file = Path(folder) / f"{name}.{ending}"
        if not file.is_file():
            raise InputError(f"a knowledge-aware model needs the file {file.name} in {folder}")
        result.update(file.read_bytes())
    return result.hexdigest()
