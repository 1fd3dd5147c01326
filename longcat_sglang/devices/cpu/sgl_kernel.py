"""Stands in for `sgl_kernel` on a CPU without it: the functions of it that SGLang 0.5.21 imports whatever it serves.

All are steps of speculation, and each writes into the tensors it is given, as SGLang's Triton and CUDA kernels do.
A request's slots are its row of `req_to_token`, an integer [requests, longest context]; `pool_len` is its width, which
a tensor knows itself. A tree has n nodes, of which the root is the last token that is certain, and a chain is a tree.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from typing import NoReturn

import torch
from torch import Tensor

_FULL_MASK, _TREE_ONLY = 0, 1
"""Those values of `TreeMaskMode` (speculative/eagle_utils.py) that the functions below support."""


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"sgl_kernel is not installed, and longcat-serving's stand-in for it, which has what LongCat-Flash needs on a "
        f"CPU, has no {name}; for another model install sgl_kernel"
    )


# -- slots -------------------------------------------------------------------------------------------


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Write the slots of R requests, one after the other, into columns `starts` to `ends` [R] of their rows.

    As `assign_req_to_token_pool` (mem_cache/allocation.py).
    """
    rows, columns = _places(req_pool_indices, starts, ends)
    req_to_token[rows, columns] = slots[: len(rows)].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Read back what `assign_req_to_token_pool_cpu` writes, into the front of `slots`.

    As `assign_extend_cache_locs` (kernels/ops/speculative/cache_locs.py).
    """
    rows, columns = _places(req_pool_indices, starts, ends)
    slots[: len(rows)] = req_to_token[rows, columns]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    pool_len: int,
    topk: int,
    steps: int,
) -> None:
    """The `topk * steps` slots that follow each request's tokens: those that its drafts are written to.

    As `assign_draft_cache_locs_contiguous` (kernels/ops/speculative/cache_locs.py).
    """
    ends = seq_lens + topk * steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, slots, pool_len)


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """Gather the slots of accepted nodes to the front of `accept_out_cache_loc`; -1 is no node.

    As `fill_accept_out_cache_loc` (kernels/ops/speculative/eagle.py).
    """
    accepted = accept_index[accept_index >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy rows of caches that are given by address: of each, rows of `stride` bytes. Targets may be sources.

    As `copy_all_layer_kv_cache_tiled` (kernels/ops/kvcache/cache_move.py).
    """
    if not len(targets):
        return
    count = 1 + int(torch.cat((targets, sources)).max())
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (count * stride)).from_address(address)
        cache = torch.frombuffer(memory, dtype=torch.uint8).view(count, stride)
        cache[targets.long()] = cache[sources.long()]


def _places(req_pool_indices: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each slot of columns `starts` to `ends`, request by request: two int64 of equal length."""
    rows: list[int] = []
    columns: list[int] = []
    for row, first, last in zip(req_pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        rows += [row] * (last - first)
        columns += range(first, last)
    of_slots = torch.tensor([rows, columns], dtype=torch.int64)
    return of_slots[0], of_slots[1]


# -- trees -------------------------------------------------------------------------------------------


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    n: int,
    tree_mask_mode: int,
) -> None:
    """Make a tree of each request's best drafts, for R requests.

    selected_index: int64 [R, n - 1], ascending, the candidates that are nodes; candidate c is one of the `topk`
    children of entry c // topk of parent_list, int64 [R, entries], which names a candidate; entry 0 is the root.
    Written are: tree_mask, bool, what each node sees, [R, n, n] flat, or with the request's tokens before it in each
    row; positions: int64 [R n]; and, all int64 [R, n] with -1 for none, the number of each node among all, its first
    child and its next sibling.

    As `sgl_build_tree_kernel_efficient_triton` (kernels/ops/speculative/spec_tree.py), also in that no node links to
    one whose parent was not selected.

    Raises:
        NotImplementedError: for a mask in bits.
    """
    if tree_mask_mode not in (_FULL_MASK, _TREE_ONLY):
        raise NotImplementedError(f"tree_mask_mode: {tree_mask_mode}, wanted {_FULL_MASK} or {_TREE_ONLY}")
    trees = torch.eye(n, dtype=torch.bool).repeat(len(seq_lens), 1, 1)
    depths = torch.zeros(len(seq_lens), n, dtype=torch.int64)
    for r, (selected, entries) in enumerate(zip(selected_index.tolist(), parent_list.tolist(), strict=True)):
        node_of = {candidate: node for node, candidate in enumerate(selected, start=1)}
        youngest: dict[int, int] = {}
        for node, candidate in enumerate(selected, start=1):
            parent = node_of.get(entries[candidate // topk], -1) if candidate // topk else 0
            trees[r, node] |= trees[r, max(parent, 0)]
            depths[r, node] = depths[r, max(parent, 0)] + 1
            if parent == -1:
                continue
            if parent in youngest:
                retrieve_next_sibling[r, youngest[parent]] = node
            else:
                retrieve_next_token[r, parent] = node
            youngest[parent] = node
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    positions.copy_((seq_lens.unsqueeze(1) + depths).flatten())
    if tree_mask_mode == _TREE_ONLY:
        tree_mask[: trees.numel()] = trees.flatten()
        return
    first = 0
    for tree, length in zip(trees, seq_lens.tolist(), strict=True):
        last = first + n * (length + n)
        tree_mask[first:last].view(n, length + n)[:, length:] = tree
        first = last


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow the target from the root of each tree, as far as a child is what it predicts.

    candidates: [R, n] tokens of the nodes; target_predict: [R, n], what the target predicts after each;
    retrive_*: as `build_tree_kernel_efficient_cpu` writes them. Written are: accept_index [R, longest path], the
    numbers of the nodes on the path; accept_token_num [R], their count without the root; predicts [R n], what the
    target predicts after each of them.

    As `verify_tree_greedy_kernel_triton` (kernels/ops/speculative/spec_tree.py).
    """
    tokens, predicted = candidates.tolist(), target_predict.view_as(candidates).tolist()
    numbers, children, siblings = retrive_index.tolist(), retrive_next_token.tolist(), retrive_next_sibling.tolist()
    for r in range(len(tokens)):
        path = [0]
        while len(path) < accept_index.shape[1]:
            child = children[r][path[-1]]
            while child != -1 and tokens[r][child] != predicted[r][path[-1]]:
                child = siblings[r][child]
            if child == -1:
                break
            path.append(child)
        accept_token_num[r] = len(path) - 1
        for depth, node in enumerate(path):
            accept_index[r, depth] = numbers[r][node]
            predicts[numbers[r][node]] = predicted[r][node]


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, stride: int) -> None:
    """The last token of each path: accept_tokens [R stride], of which the first `accept_lens` [R] are on the path.

    As `fill_bonus_tokens` (kernels/ops/speculative/eagle.py).
    """
    last = torch.arange(len(accept_lens)) * stride + accept_lens.long() - 1
    bonus_tokens[: len(accept_lens)] = accept_tokens.flatten()[last]
