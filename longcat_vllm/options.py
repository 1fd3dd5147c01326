"""What becomes of vLLM's options where LongCat-Flash is served: the rows of the docs' table.

`deployment.py` and the modules that it calls make the refusals; a test compares them with the rows.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.options import Option, Outcome

RUN, TESTED = "run on a CPU", "run on a CPU, in the tests"
READ = "read in vLLM 0.32"

OPTIONS: tuple[Option, ...] = (
    # -- where weights come from
    Option(
        "--load-format auto",
        Outcome.SERVED,
        "And `hf`, `safetensors`, `fastsafetensors`, `instanttensor`, `runai_streamer`: the checkpoint is checked "
        "before any worker starts, a name of the Hub too where its cache has all of it.",
        "`auto` and a cached name run on a CPU; the check of all of them in the tests",
    ),
    Option(
        "--load-format pt",
        Outcome.SERVED,
        "And `npcache`, `tensorizer`, `modelexpress`, a plugin's: not checked beforehand, as the log says.",
        "the check in the tests; the formats read",
    ),
    Option("--load-format dummy", Outcome.SERVED, "Nothing to check.", TESTED),
    Option(
        "--load-format sharded_state",
        Outcome.WITH_EXCEPTIONS,
        "Without drafts. With them it is refused, as a saved state has no MTP layer. Save it on a GPU with "
        "--moe-backend triton, as the kernels of a CPU and FlashInfer's repack the weights.",
        TESTED,
    ),
    Option(
        "--quantization",
        Outcome.WITH_EXCEPTIONS,
        "A checkpoint in FP8 with blocks of 128 x 128 is served as it is published. Every other quantisation is "
        "refused on a CPU, and on a GPU left to vLLM's own class.",
        TESTED,
    ),
    Option(
        "--convert",
        Outcome.WITH_EXCEPTIONS,
        "`embed` (--runner pooling). `classify` is refused on a CPU, and on a GPU left to vLLM's own class.",
        TESTED,
    ),
    Option("--enable-ep-weight-filter", Outcome.SERVED, "A rank reads its own experts.", RUN),
    Option("--cpu-offload-gb", Outcome.UNTRIED, "On a GPU. On a CPU nothing is moved.", f"a CPU: {RUN}"),
    # -- chat
    Option(
        "--tool-call-parser longcat",
        Outcome.SERVED,
        "Calls in JSON and in XML, guided in the checkpoint's form ([more](agents.md#vllm)); ours in the place of "
        "vLLM's own, which reads JSON only. Other parsers are as they were.",
        "run on a CPU: stock servers over HTTP",
    ),
    Option(
        "--reasoning-parser longcat",
        Outcome.SERVED,
        "Reasoning that begins in the prompt or in the output ([more](agents.md#vllm)). Refused if the tokenizer has "
        "no token for a tag around it.",
        "run on a CPU: stock servers over HTTP",
    ),
    # -- adapters
    Option(
        "--enable-lora",
        Outcome.SERVED,
        "Adapters of attentions and dense FFNs, several in a batch and with drafts, which they do not change. An "
        "adapter of `kv_b_proj`, experts, the router, the embedding or the head is refused when it is loaded.",
        TESTED,
    ),
    Option(
        "--lora-target-modules",
        Outcome.WITH_EXCEPTIONS,
        "A module that no adapter can change is refused.",
        TESTED,
    ),
    # -- experts
    Option(
        "--moe-backend",
        Outcome.WITH_EXCEPTIONS,
        "auto, triton, flashinfer_cutlass, humming; for experts in FP8 on a GPU auto, triton, flashinfer_cutlass, "
        "deep_gemm. Others are refused on a CPU, and on a GPU left to vLLM's own class, as their kernels are not known "
        "to skip zero experts. Where vLLM's own choice is such a kernel, Triton's is taken, which is said in the log.",
        "the refusal and the choice in the tests; the kernels read",
    ),
    Option(
        """--additional-config '{"longcat": {"kernels": true}}'""",
        Outcome.SERVED,
        "Router and experts by longcat-serving's own kernels ([more](kernels.md)), on GPUs of compute capability 9.0 "
        "and more. Refused on a CPU, in float16, with another --moe-backend than auto and triton or another "
        "--all2all-backend than allgather_reducescatter, with VLLM_BATCH_INVARIANT, and if a rank has less than whole "
        "blocks of an expert in FP8.",
        "interpreted on a CPU, in the tests; no GPU has run it",
    ),
    Option(
        """--additional-config '{"longcat": {"flashinfer_mla": true}}'""",
        Outcome.SERVED,
        "On Hopper, decode steps attend by FlashInfer's MLA, in which a token, its drafts and all heads share tiles of "
        "128 rows; SGLang has it as --attention-backend flashinfer. FlashInfer compiles it at the first start, with "
        "nvcc, in minutes. Refused on other devices, for other dimensions than latent 512 and rope 64, with "
        "--attention-backend, decode context parallelism and VLLM_BATCH_INVARIANT.",
        "FlashInfer's Python run on a CPU with a stand-in for its kernels, in the tests; no GPU has run it",
    ),
    Option(
        """--additional-config '{"longcat": {"ffn_experts": NUMBER}}'""",
        Outcome.SERVED,
        "The mean of FFN experts a token is held at NUMBER in every layer ([more](dial.md)), or between two, as in "
        "`[5, 8]`, by the queue ([more](dial.md#by-the-queue)). Refused with --data-parallel-size, "
        "--decode-context-parallel-size, --prefill-context-parallel-size, --enable-dbo and --enable-sleep-mode, two "
        "with --scheduler-cls, and for a mean that no bias holds.",
        f"{TESTED}; no GPU has run it",
    ),
    Option(
        """--additional-config '{"longcat": {"full_queue": NUMBER}}'""",
        Outcome.SERVED,
        "So many requests wait where the lesser of two `ffn_experts` is the target; without it, as many as "
        "--max-num-seqs. Refused without two.",
        f"{TESTED}; no GPU has run it",
    ),
    Option("--enable-expert-parallel", Outcome.SERVED, "A rank computes its own experts, zero experts none.", TESTED),
    Option(
        "--all2all-backend",
        Outcome.WITH_EXCEPTIONS,
        "allgather_reducescatter. Where data-parallel ranks share experts, deepep_low_latency is refused, as it has "
        "room for 11 experts a token where LongCat has 12; others than these and deepep_high_throughput are left to "
        "vLLM's own class, as they are not known to take zero experts.",
        f"the outcome of every value in the tests; the reasons {READ}",
    ),
    Option(
        "--all2all-backend deepep_high_throughput",
        Outcome.UNTRIED,
        "It turns received choices of -1 into another rank's expert, which the expert map drops.",
        READ,
    ),
    Option(
        "--moe-backend triton",
        Outcome.UNTRIED,
        "On a GPU. vLLM 0.32 has tuned tiles for H100, H200 and B200 where 8 or 16 ranks split every expert of "
        "LongCat-Flash-Chat, and none where ranks share experts or one has all: it says so in its log, and takes "
        "defaults.",
        "the kernel run in Triton's interpreter, and compiled; the tiles are files of vLLM's",
    ),
    Option(
        "--moe-backend flashinfer_cutlass",
        Outcome.UNTRIED,
        "vLLM's own choice on Blackwell, but for experts in bf16 of several data-parallel ranks, and on Hopper for "
        "experts in FP8 that ranks share. FlashInfer compiles it while vLLM starts, in 248 files and with nvcc, unless "
        "`vllm download-kernels` was run. With `--moe-backend triton` nothing is compiled by nvcc.",
        f"the files counted; the rest {READ}",
    ),
    Option(
        """--additional-config '{"longcat": {"init_expert_location": "FILE"}}'""",
        Outcome.SERVED,
        "Places of experts, redundant ones among them, as `longcat place` writes them, or counts, by which each expert "
        "is placed once ([more](placement.md)). With --enable-expert-parallel on several ranks. Refused with "
        "--expert-placement-strategy round_robin, --enable-ep-weight-filter and --load-format sharded_state; vLLM's "
        "`reload_weights` is refused too.",
        "two ranks on a CPU, in the tests; no GPU has run it",
    ),
    Option(
        "--enable-eplb",
        Outcome.SERVED,
        "vLLM counts rows of FFN experts, and moves experts between ranks by its own policy ([more](placement.md)). A "
        "choice of a zero expert is no row. Refused with `init_expert_location`, --load-format sharded_state, "
        "--enable-elastic-ep, pipeline stages or pooling without the V2 model runner, and a number of experts that "
        "ranks do not divide; as the model is loaded, with experts of some layers in FP8 and of others in bf16. New "
        "weights for a running server are refused too. vLLM itself refuses it on a CPU.",
        "dry run of eight ranks; the kernel that looks ids up interpreted; no GPU has run it",
    ),
    Option(
        """--additional-config '{"longcat": {"eplb": {}}}'""",
        Outcome.SERVED,
        "The same on a CPU, with `num_redundant_experts`, `window_size`, `step_interval`, `log_balancedness` and "
        "`log_balancedness_interval` of --eplb-config in it. Refused on a GPU, with drafts of the MTP layer, "
        "--worker-cls and the V2 model runner; as the model is loaded, if experts in FP8 need several kernels.",
        "two ranks on a CPU, in the tests",
    ),
    Option(
        "--worker-cls",
        Outcome.WITH_EXCEPTIONS,
        "Refused with `eplb` on a CPU and `overlap` on a GPU, which have workers of their own. Without them it is "
        "untried.",
        "the refusals in the tests",
    ),
    Option(
        "--enable-return-routed-experts",
        Outcome.REFUSED,
        "Experts are returned as unsigned numbers: a zero expert (-1) would be expert 255 or 65535.",
        f"the refusal in the tests; the reason {READ}",
    ),
    Option(
        "--enable-dbo",
        Outcome.UNTRIED,
        "It needs DeepEP or NIXL, which need GPUs. Refused with the experts on a second stream, and with the dial.",
        READ,
    ),
    # -- drafts
    Option(
        "--speculative-config",
        Outcome.WITH_EXCEPTIONS,
        "With the method `mtp` the checkpoint's own MTP layer drafts. Another draft model is refused, and this one "
        "with a quantisation, cache or reduction of its own.",
        TESTED,
    ),
    Option("--speculative-config ngram", Outcome.SERVED, "Drafts are found in the context.", RUN),
    Option("--speculative-config suffix", Outcome.UNTRIED, "It needs the package arctic-inference.", RUN),
    Option("--speculative-config ngram_gpu", Outcome.UNTRIED, "It needs a GPU.", RUN),
    Option(
        "--speculative-config eagle", Outcome.UNTRIED, "vLLM refuses a LongCat checkpoint as an EAGLE drafter.", RUN
    ),
    # -- the cache, and what is kept in it
    Option(
        "--kv-cache-dtype",
        Outcome.WITH_EXCEPTIONS,
        "On a GPU. In FP8 it is refused on a CPU, where the cache has the model's dtype.",
        f"a CPU: {TESTED}; a GPU: dry run",
    ),
    Option("--enable-prefix-caching", Outcome.SERVED, "On a CPU too, where vLLM turns it off for MLA.", TESTED),
    Option("--enable-chunked-prefill", Outcome.SERVED, "On a CPU too, where vLLM turns it off for MLA.", TESTED),
    Option("--prefix-caching-hash-algo", Outcome.SERVED, "It is the scheduler's.", RUN),
    Option("--kv-transfer-config", Outcome.SERVED, "ExampleConnector; others are untried.", RUN),
    Option("--kv-offloading-size", Outcome.UNTRIED, "vLLM has it on GPUs only. Refused with the dial.", RUN),
    Option("--enable-sleep-mode", Outcome.UNTRIED, "vLLM has it on GPUs only. Refused with the dial.", RUN),
    # -- parallelism
    Option("--tensor-parallel-size", Outcome.SERVED, "It splits heads, dense FFNs and experts.", TESTED),
    Option(
        "--pipeline-parallel-size",
        Outcome.WITH_EXCEPTIONS,
        "Without drafts. With them it is refused where the model runner makes them on one stage only.",
        TESTED,
    ),
    Option(
        "--decode-context-parallel-size",
        Outcome.UNTRIED,
        "On a GPU. Refused on a CPU, where every rank attends to the whole context.",
        TESTED,
    ),
    Option(
        "--data-parallel-size",
        Outcome.WITH_EXCEPTIONS,
        "On a CPU with --enable-expert-parallel: ranks send tokens to each other's experts while the dense path of the "
        "layer runs ([more](overlap.md)); without that it is refused. On a GPU it is vLLM's own, and not tried. With "
        "--tensor-parallel-size each rank sends a share of the tokens that it has in common with others, as in vLLM's "
        "models.",
        "two ranks on a CPU, with drafts too, the refusal, and the shares of two ranks, in the tests; by hand in bf16, "
        "in FP8, two pairs of ranks, and a server",
    ),
    Option(
        """--additional-config '{"longcat": {"overlap": true}}'""",
        Outcome.SERVED,
        "On a GPU a layer's experts run beside its dense path, on a second stream ([more](overlap.md)). Off by "
        "default: no GPU has run it. Refused with --enable-dbo or --ubatch-size, --prefill-context-parallel-size, "
        "--worker-cls, and where tokens are sent by NCCL between ranks that are tensor-parallel too; on a CPU where no "
        "tokens are sent.",
        "the order of a layer's operations in the tests, with a stand-in for streams; dry run",
    ),
    Option(
        """--additional-config '{"longcat": {"overlap": false}}'""",
        Outcome.SERVED,
        "Where data-parallel ranks on a CPU share experts, a layer's dense path waits for them; without the option it "
        "runs meanwhile ([more](overlap.md)).",
        TESTED,
    ),
    # -- how steps are run
    Option(
        "--async-scheduling",
        Outcome.UNTRIED,
        "On a GPU, where it is vLLM's default. On a CPU vLLM turns it off, whatever is requested.",
        f"a CPU: {RUN}; a GPU: {READ}",
    ),
    Option("--enforce-eager", Outcome.SERVED, "With and without.", TESTED),
    Option("-O", Outcome.SERVED, "Compiled or not.", "0 run on a CPU, 2, the default, in the tests"),
    Option("--enable-prompt-embeds", Outcome.SERVED, "The same tokens as from the prompt itself.", RUN),
    Option("--scheduling-policy", Outcome.SERVED, "It is the scheduler's.", RUN),
    Option(
        "--attention-backend",
        Outcome.UNTRIED,
        "On a GPU. A CPU has one backend, whatever is requested.",
        f"a CPU: {RUN}",
    ),
    Option("--linear-backend", Outcome.UNTRIED, "On a GPU. On a CPU it chooses none of LongCat's kernels.", READ),
    Option(
        "--model-impl transformers", Outcome.UNTRIED, "On a CPU vLLM fails with it: its MLA takes other sizes.", RUN
    ),
)
