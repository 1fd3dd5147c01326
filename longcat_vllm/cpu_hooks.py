"""Every change of vLLM for a CPU alone: rows of `longcat_vllm.hooks.HOOKS`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.hooks import Entry, Hook, Stage, Wrapper

HOOKS: tuple[Hook, ...] = (
    Wrapper(
        name="CPU platform settings",
        target="vllm.platforms.cpu.CpuPlatform.check_and_update_config",
        around="longcat_vllm.devices.cpu.patches:keep_scheduling_settings",
        concerns="longcat_vllm.engine:configures_longcat",
        stage=Stage.DEPLOYMENT,
        device="cpu",
        why="vLLM turns chunked prefill and prefix caching off for any MLA model on a CPU and forces blocks of 16, "
        "because its CPU_MLA kernel asks for it (platforms/cpu.py:235,521); our attention backend does not.",
        remove_when="The attention backend decides this, not the platform.",
    ),
    Wrapper(
        name="generators of discarded chunks",
        target="vllm.v1.worker.cpu_model_runner.CPUModelRunner.sample_tokens",
        around="longcat_vllm.devices.cpu.patches:sample_without_discarded_requests",
        concerns="longcat_vllm.engine:runs_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the first seeded request whose prompt comes in chunks ends the engine: vLLM undoes the draw of a "
        "discarded token with `Generator.set_offset`, which only generators of accelerators have "
        "(`GPUModelRunner._bookkeeping_sync`).",
        remove_when="vLLM's CPU runner draws nothing for such a chunk, or undoes it in another way.",
    ),
    Wrapper(
        name="sampling parameters of drafts",
        target="vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
        around="longcat_vllm.devices.cpu.patches:expand_on_a_cpu",
        concerns="longcat_vllm.engine:samples_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU drafts of sampled requests are verified with uninitialised temperature, top-k and top-p: "
        "`cpu_triton_utils._expand_kernel_impl` writes into a copy of any tensor that is not int64.",
        remove_when="It writes into the tensor that it is given.",
    ),
    Wrapper(
        name="constraints of no drafts",
        target="vllm.v1.sample.rejection_sampler.apply_sampling_constraints",
        around="longcat_vllm.devices.cpu.patches:constrain_drafts_there_are",
        concerns="longcat_vllm.engine:samples_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the first sampled request with top-k and without top-p ends an engine that speculates, whatever "
        "the method: a step without drafts goes through the rejection sampler too, and `apply_top_k_only` takes the "
        "maximum of an empty tensor (v1/sample/ops/topk_topp_sampler.py:529).",
        remove_when="`apply_top_k_only` accepts logits without rows.",
    ),
    Wrapper(
        name="lengths of drafts",
        target="vllm.v1.spec_decode.eagle.EagleProposer.prepare_inputs",
        around="longcat_vllm.devices.cpu.patches:prepare_with_lengths_of_its_own",
        concerns="longcat_vllm.engine:drafts_for_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the second draft of a chain and those after it attend to an uninitialised slot of the cache, or "
        "to one of a rejected draft: a batch's lengths and the host's upper bound of them are one tensor, as nothing "
        "is copied (`async_tensor_h2d`), and each step of a chain adds one to both.",
        remove_when="They are two tensors on a CPU too.",
    ),
    Entry(
        name="time of moving experts",
        target="vllm.v1.worker.cpu.shm._EventPlaceholder.elapsed_time",
        put="longcat_vllm.devices.cpu.patches:time_events",
        found="longcat_vllm.devices.cpu.patches:what_times_events",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the first move of experts ends the engine: vLLM logs how long it took, by events that have stand-"
        "ins there without that method (distributed/eplb/eplb_state.py:957).",
        remove_when="vLLM's stand-in has it, or a CPU takes another clock.",
    ),
    Wrapper(
        name="requests without an adapter",
        target="vllm.lora.model_manager.LoRAModelManager._init_punica_wrapper",
        around="longcat_vllm.devices.cpu.patches:shrink_with_adapters_only",
        concerns="longcat_vllm.engine:adapts_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the requests of a batch that name no adapter are answered with the last adapter that is loaded: "
        "their index is -1, which `lora/ops/torch_ops/lora_ops.py` reads as the last index.",
        remove_when="Rows with an index of -1 are left as they are, as the Triton kernels leave them.",
        upstream="https://github.com/vllm-project/vllm/pull/48421",
    ),
    Wrapper(
        name="chains of drafts",
        target="vllm.v1.spec_decode.eagle.EagleProposer.propose",
        around="longcat_vllm.devices.cpu.drafting:draft_chain",
        concerns="longcat_vllm.engine:drafts_for_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="On a CPU the way of one more draft through vLLM's proposer, which builds metadata anew for it, and "
        "through the model takes longer than the MTP layer's few small products.",
        remove_when="vLLM's proposer has a compiled chain of drafts on a CPU, as graphs are on CUDA.",
    ),
    Wrapper(
        name="end of warm-up on a CPU",
        target="vllm.v1.worker.cpu_worker.CPUWorker.compile_or_warm_up_model",
        around="longcat_vllm.metrics:begin_when_warm",
        concerns="longcat_vllm.engine:runs_longcat",
        stage=Stage.MODEL,
        device="cpu",
        why="As end of warm-up; the CPU's worker has a method of its own for it.",
        remove_when="As end of warm-up.",
    ),
)
