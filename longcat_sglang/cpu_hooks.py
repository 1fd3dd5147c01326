"""Every change of SGLang for a CPU alone: rows of `longcat_sglang.hooks.HOOKS`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.hooks import Hook, Stage, Wrapper

HOOKS: tuple[Hook, ...] = (
    Wrapper(
        name="chains of drafts",
        target="sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft_forward",
        around="longcat_sglang.devices.cpu.drafting:draft_chain",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the way of one more draft through SGLang's model runner, layer boundaries and logits takes "
        "longer than the MTP layer's few small products.",
        remove_when="`EagleDraftWorker` has a compiled chain of drafts on a CPU, as graphs are on CUDA.",
    ),
    Wrapper(
        name="drafts after a verification",
        target="sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._draft_extend_for_decode",
        around="longcat_sglang.devices.cpu.drafting:draft_after_verification",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="As chains of drafts.",
        remove_when="As chains of drafts.",
    ),
    Wrapper(
        name="greedy steps with drafts",
        target="sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation",
        around="longcat_sglang.devices.cpu.greedy_chains:speculate",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU three batches and a tree are built for a step in which chains are drafted and verified, which "
        "takes longer than the models' passes, if these are small. Spans of SGLang's profiler are not in it.",
        remove_when="As chains of drafts.",
    ),
    Wrapper(
        name="sum and division by ranks",
        target="sglang.srt.distributed.parallel_state.GroupCoordinator.reduce_scatterv",
        around="longcat_sglang.devices.cpu.patches:sum_and_take_own_rows",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU data-parallel attention with as many expert-parallel ranks ends the server at the first request: "
        "the sum of which each rank takes its tokens is asked of NCCL.",
        remove_when="`reduce_scatterv` knows groups of CPUs.",
        upstream="sgl-project/sglang#31290 (open, for XPU)",
    ),
    Wrapper(
        name="recorded choices",
        target="sglang.srt.eplb.expert_distribution._ExpertDistributionRecorderReal._on_hook",
        around="longcat_sglang.devices.cpu.patches:note_choices_while_recording",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU `--expert-distribution-recorder-mode` ends the server at the first step that is not recorded: "
        "`torch.cpu` cannot say whether a graph is captured.",
        remove_when="The recorder asks no device that captures no graphs.",
    ),
    Wrapper(
        name="dump of recorded choices",
        target="sglang.srt.eplb.expert_distribution._StatAccumulator.dump",
        around="longcat_sglang.devices.cpu.patches:dump_counts",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the first dump, and with it the first balancing of `--enable-eplb`, ends the server: `torch.cpu` "
        "has no cache to empty.",
        remove_when="`_StatAccumulator` empties no cache of a device that has none.",
    ),
    Wrapper(
        name="moves of experts",
        target="sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater.update",
        around="longcat_sglang.devices.cpu.patches:move_experts",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="As dump of recorded choices, at the first move.",
        remove_when="`ExpertLocationUpdater` empties no cache of a device that has none.",
    ),
    Wrapper(
        name="selection of drafts",
        target="sglang.srt.speculative.spec_utils._select_top_k_tokens_later",
        around="longcat_sglang.devices.cpu.patches:select_drafts_without_a_compiler",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the first answer of a server with two drafts or more waits 16 s for `torch.compile`, which needs "
        "a C++ compiler, for a few operations on tiny tensors.",
        remove_when="`_select_top_k_tokens_later` is not compiled on a CPU.",
    ),
    Wrapper(
        name="sampled verification",
        target="sglang.srt.speculative.eagle_utils.eagle_sample",
        around="longcat_sglang.devices.cpu.patches:sample_where_requests_do",
        concerns="longcat_sglang.engine:verifies_longcat",
        wrap="longcat_sglang.registration:register_around",
        wrapped_by="longcat_sglang.registration:module_around",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU requests that sample are answered greedily while drafting, whatever their temperature: "
        "`_verify_uses_greedy` takes the greedy path for every request there, of every model.",
        remove_when="`eagle_sample` samples on a CPU.",
    ),
)
