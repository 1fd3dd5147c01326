"""Tells whether the MTP layer's embedding is the trunk's, while the tensors of a checkpoint pass by."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator

import torch.distributed
from torch import Tensor

from longcat_core.weights.names import MTP_PREFIX

logger = logging.getLogger(__name__)

_TRUNK, _MTP = "model.embed_tokens.weight", f"{MTP_PREFIX}embed_tokens.weight"
_ROWS = 4096
"""Hashed at once, which bounds the copy that is made of them."""


def compared(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. If both embeddings are among them and differ in a number, that is logged after the last.

    Neither is kept: a hash is, so that loaders may use a tensor's memory again, and the second costs no memory. Of
    several ranks, which all read the checkpoint, the first compares.
    """
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    hashes: dict[str, bytes] = {}
    for name, tensor in weights:
        if is_first and name in (_TRUNK, _MTP):
            hashes[name] = _hash(tensor)
        yield name, tensor
    if len(hashes) == 2 and hashes[_TRUNK] != hashes[_MTP]:
        logger.warning("%s differs from %s: drafts are made with the first, as it is stored", _MTP, _TRUNK)


def _hash(tensor: Tensor) -> bytes:
    """Of shape and numbers, whatever their dtype."""
    digest = hashlib.sha256(str(list(tensor.shape)).encode())
    for rows in tensor.split(_ROWS):
        digest.update(rows.float().cpu().contiguous().numpy())
    return digest.digest()
