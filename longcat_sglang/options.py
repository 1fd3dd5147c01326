"""SGLang's options: what becomes of each with LongCat-Flash, as data, and the refusals that follow from it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from longcat_core.config import LongcatConfig
from longcat_core.plugin.options import Option, Outcome
from longcat_sglang import placement
from longcat_sglang.engine import MTP_ALGORITHMS, PARSER, algorithm_of, drafts_with_mtp
from longcat_sglang.requested import ON_REQUEST

Concern = Callable[[Any, LongcatConfig], bool]
"""Whether SGLang's settings request what an option does."""


class Rule(NamedTuple):
    option: Option
    concerns: Concern
    instead: str = ""
    """What helps besides leaving the option out."""
    device: str = ""
    """The only device that it applies to, by SGLang's name; all devices if it is empty."""

    def applies(self, settings: Any, longcat: LongcatConfig) -> bool:
        return self.device in ("", settings.device) and self.concerns(settings, longcat)


READ, RUN = "read in SGLang 0.5.21", "run on a CPU"
SKIP_ZERO_EXPERTS = ("auto", "triton", "deep_gemm")
"""SGLang's MoE runners that skip ids of -1, for experts in bf16 and in FP8: Triton's kernels by `filter_expert`, and
DeepGEMM as its rows are counted, scattered and gathered without them (`fused_moe_dispatch_index`, `ep_scatter`,
`deepep_post_reorder_triton_kernel`); auto is one of the two. Read in SGLang 0.5.21."""
AS_DEEPEP = ("mooncake", "nixl", "mori", "pplx")
"""Values of --moe-a2a-backend with which SGLang's experts are `DeepEPMoE`, as with deepep. Those in bf16 then need
DeepGEMM, which SGLang gives them with deepep and pplx only: else they fail at the first prompt
(`DeepEPMoE.run_moe_core`)."""
DEEPEP_COLUMNS, RECORDED_COLUMNS = 11, 8
"""Experts a token can have in DeepEP's low-latency kernels (`kNumMaxTopK`), and in the recorder of single passes
(`_DetailSinglePassGatherer._TOP_K_NUM`)."""


def _is(name: str, *values: Any) -> Concern:
    return lambda settings, _: getattr(settings, name) in values


def _is_set(*names: str) -> Concern:
    return lambda settings, _: any(getattr(settings, name) for name in names)


def _has_no_runner(settings: Any, longcat: LongcatConfig) -> bool:
    """Whether neither class has a kernel for experts in bf16 behind this transport."""
    runner, transport = settings.moe_runner_backend, settings.moe_a2a_backend
    has_one = runner not in SKIP_ZERO_EXPERTS or (runner == "deep_gemm" and transport == "pplx")
    return transport in AS_DEEPEP and longcat.quantization is None and not has_one


def _refused(flag: str, why: str, known_by: str = READ) -> Option:
    return Option(flag, Outcome.REFUSED, why, known_by)


def _excepted(flag: str, why: str, known_by: str = READ) -> Option:
    return Option(flag, Outcome.WITH_EXCEPTIONS, why, known_by)


def _of_gpus(flag: str, refused: str, known_by: str) -> Option:
    return Option(flag, Outcome.UNTRIED, f"On a GPU. {refused} on a CPU.", known_by)


def _parses_in_workers(settings: Any, _: LongcatConfig) -> bool:
    names = {settings.tool_call_parser, settings.reasoning_parser}
    return settings.tokenizer_worker_num > 1 and not names.isdisjoint((PARSER, "auto"))


WRONG: tuple[Rule, ...] = (
    Rule(
        _excepted(
            "--tokenizer-worker-num",
            "SGLang loads no plugins in these processes, and the parsers `longcat`, which `auto` takes for LongCat's "
            "templates, are unknown there; without them it is served",
        ),
        _parses_in_workers,
        "leave --tool-call-parser and --reasoning-parser out",
    ),
    Rule(
        _refused(
            "--ep-dispatch-algorithm lp",
            "`lp` and `fake` are done by SGLang's own router, which LongCat-Flash does not use",
        ),
        _is("ep_dispatch_algorithm", "lp", "fake"),
    ),
    Rule(
        _refused("--elastic-ep-backend", "experts of a lost rank move to other ranks, which was not tried"),
        _is("elastic_ep_backend", "mooncake", "nixl"),
    ),
    Rule(
        _refused("--enable-elastic-expert-backup", "it is for --elastic-ep-backend"),
        _is_set("enable_elastic_expert_backup"),
    ),
    Rule(
        _refused(
            "--moe-a2a-backend deepep",
            f"a token has more than the {DEEPEP_COLUMNS} experts that DeepEP's low-latency kernels take",
        ),
        lambda settings, longcat: (
            settings.moe_a2a_backend == "deepep"
            and settings.deepep_mode != "normal"
            and longcat.moe_topk > DEEPEP_COLUMNS
        ),
        "give --deepep-mode normal",
        device="cuda",
    ),
    Rule(
        _refused(
            "--moe-a2a-backend deepep --moe-runner-backend triton",
            "DeepEP hands tokens over as DeepGEMM takes them, and Triton's runner fails at the first prompt",
        ),
        lambda settings, _: settings.moe_a2a_backend == "deepep" and settings.moe_runner_backend == "triton",
        "give --moe-runner-backend deep_gemm",
        device="cuda",
    ),
    Rule(
        _refused(
            "--moe-a2a-backend mooncake",
            "neither class has a kernel for experts in bf16 behind it, nor behind nixl, mori and pplx, but for "
            "--moe-runner-backend deep_gemm behind pplx: they fail at the first prompt",
        ),
        _has_no_runner,
        "give --moe-a2a-backend deepep --deepep-mode normal",
        device="cuda",
    ),
    Rule(
        _refused(
            "--enable-two-batch-overlap",
            "SGLang can split the layers of other models only (batch_overlap/operations_strategy.py)",
        ),
        _is_set("enable_two_batch_overlap"),
    ),
    Rule(
        _refused(
            "--moe-dense-tp-size", "the dense FFNs are divided among all ranks, and would sum rows of different tokens"
        ),
        lambda settings, _: settings.moe_dense_tp_size is not None,
    ),
    Rule(
        _refused("--dwdp-size", "it implies --moe-dense-tp-size 1, and would sum MoE outputs over ranks once more"),
        lambda settings, _: (settings.dwdp_size or 1) > 1,
    ),
    Rule(_refused("--enable-waterfill", "it asks for DeepEP after options were checked"), _is_set("enable_waterfill")),
    Rule(
        _refused("--dcp-size", "decode context parallelism was not tried with LongCat's two attentions a layer"),
        lambda settings, _: (settings.dcp_size or 1) > 1,
    ),
    Rule(
        _refused("--attn-cp-size", "context parallelism was not tried with LongCat's two attentions a layer"),
        lambda settings, _: (settings.attn_cp_size or 1) > 1,
    ),
    Rule(
        _refused(
            "--enable-lora",
            "SGLang keeps one adapter's weights a layer for each kind of projection (lora/mem_pool.py), and a LongCat "
            "layer has two of each, so that one would get the other's",
        ),
        lambda settings, _: bool(settings.enable_lora or (settings.lora_paths and settings.enable_lora is None)),
    ),
    Rule(
        _excepted(
            "--enable-return-routed-experts",
            "on a CPU SGLang's buffer for them, of pinned memory, needs CUDA; on a GPU -1 stands for a zero expert",
            f"a CPU: {RUN}; a GPU: {READ}",
        ),
        _is_set("enable_return_routed_experts"),
        device="cpu",
    ),
    Rule(
        _refused(
            "--expert-distribution-recorder-mode per_token",
            f"a token has more than the {RECORDED_COLUMNS} experts that SGLang records of one pass",
        ),
        lambda settings, longcat: (
            settings.expert_distribution_recorder_mode in ("per_token", "per_pass")
            and longcat.moe_topk > RECORDED_COLUMNS
        ),
        "give --expert-distribution-recorder-mode stat",
    ),
    Rule(
        _refused("--cpu-offload-gb", "SGLang offloads only layers that it builds itself, so it would do nothing"),
        lambda settings, _: settings.cpu_offload_gb > 0,
    ),
    Rule(
        _refused("--offload-group-size", "SGLang offloads only layers that it builds itself, so it would do nothing"),
        lambda settings, _: settings.offload_group_size > 0,
    ),
    Rule(_refused("--is-embedding", "LongCat has no pooling head"), _is_set("is_embedding")),
    Rule(
        _refused(
            "--load-format layered", "it loads module by module, for which SGLang's own class has no method either"
        ),
        _is("load_format", "layered"),
    ),
    Rule(
        _excepted(
            "--load-format sharded_state",
            "SGLang saves the target alone, so there is no MTP layer to draft with; without drafts it is served, and "
            "not checked before",
            RUN,
        ),
        lambda settings, _: (
            settings.load_format == "sharded_state"
            and drafts_with_mtp(settings)
            and settings.speculative_draft_load_format in (None, "sharded_state")
        ),
        "leave --speculative-algorithm out",
    ),
)
"""Options that are wrong with SGLang's own class as well, that do nothing, or over which SGLang fails later."""

OWN: tuple[Rule, ...] = (
    Rule(
        _excepted("--moe-runner-backend", f"only {', '.join(SKIP_ZERO_EXPERTS)} are known to skip zero experts"),
        lambda settings, _: settings.moe_runner_backend not in SKIP_ZERO_EXPERTS,
        device="cuda",
    ),
    Rule(
        _excepted(
            "--moe-a2a-backend",
            "only none and deepep are known to take -1 for a zero expert; on a CPU all but none are refused",
        ),
        lambda settings, longcat: (
            settings.moe_a2a_backend not in ("none", "deepep") and not _has_no_runner(settings, longcat)
        ),
        device="cuda",
    ),
    Rule(
        Option(
            "--enable-fused-moe-sum-all-reduce",
            Outcome.OWN_CLASS,
            "SGLang's Triton kernel writes a row of zeros for each expert that it skips, over the sum of the others",
            READ,
        ),
        _is_set("enable_fused_moe_sum_all_reduce"),
    ),
    Rule(
        Option(
            "--kt-weight-path", Outcome.OWN_CLASS, "KTransformers' experts are not known to skip zero experts", READ
        ),
        _is_set("kt_weight_path"),
    ),
    Rule(
        _excepted(
            "--speculative-algorithm",
            "longcat-serving drafts with the MTP layer (NEXTN), or on a GPU with n-grams (NGRAM); others are refused "
            "on a CPU",
        ),
        lambda settings, _: algorithm_of(settings) not in (None, *MTP_ALGORITHMS, "NGRAM"),
        device="cuda",
    ),
    Rule(
        Option("--model-impl transformers", Outcome.OWN_CLASS, "another model is asked for than ours", READ),
        _is("model_impl", "transformers"),
    ),
)
"""What SGLang's own class can serve and ours cannot; it runs on GPUs only."""

CHECKED_BY_VALUE: tuple[Option, ...] = (
    *(
        _of_gpus(f"--{kind}attention-backend", "Another than longcat-serving's is refused", RUN)
        for kind in ("", "prefill-", "decode-", "speculative-draft-")
    ),
    _excepted("--kv-cache-dtype", "FP8 is refused on a CPU", RUN),
    _of_gpus("--page-size", "Another than 1 is refused", RUN),
    _of_gpus(
        "--enable-torch-compile",
        "A step of one token keeps the kernels of any other there, as SGLang's products in PyTorch for it would "
        "compute every zero expert. Refused",
        f"a CPU: {RUN}; a GPU: {READ}",
    ),
    _refused("--pp-size", "SGLang's layer boundaries have no pipeline for LongCat", RUN),
    _excepted("--tp-size", "refused where it does not divide the attention heads", RUN),
    _excepted("--ep-size", "refused where it does not divide the FFN experts, redundant ones included", RUN),
    _refused("--eplb-algorithm deepseek_hierarchical", "those in `_hierarchical` want experts in groups", RUN),
    _excepted(
        "--speculative-draft-model-path", "refused where it is not the model, whose checkpoint has the MTP layer", RUN
    ),
    _excepted("--speculative-num-steps", "refused where it is no number of drafts", RUN),
    _excepted("--speculative-num-draft-tokens", "refused where it does not fit the tree", RUN),
    _refused("--speculative-token-map", "the MTP layer has the whole vocabulary", RUN),
    _excepted(
        "--speculative-draft-model-quantization",
        "refused where it is not what the model is in: the MTP layer is served as its tensors are",
        RUN,
    ),
    _refused("--enable-multi-layer-eagle", "LongCat has one MTP layer", RUN),
    _excepted(
        "--quantization",
        "what is not published in FP8 with blocks of 128 x 128 is left to SGLang's own class, and refused on a CPU",
    ),
)
"""Checked in `deployment.py`, as these depend on the value or on other options."""

SERVED: tuple[Option, ...] = (
    *(
        Option(
            f"--{kind}-parser longcat",
            Outcome.SERVED,
            f"{what} ([more](agents.md)); `auto` takes it for a template that has LongCat's tags.",
            f"{RUN}: stock servers over HTTP",
        )
        for kind, what in (("tool-call", "Both forms of calls"), ("reasoning", "Reasoning in LongCat's tags"))
    ),
    Option(
        "--grammar-backend",
        Outcome.SERVED,
        "Calls that are required, named or strict are guided by XGrammar alone, the default: llguidance refuses such a "
        "request, as its structural tags are others.",
        READ,
    ),
    Option("--load-format auto", Outcome.SERVED, "Checked before any worker starts, where there are safetensors.", RUN),
    Option(
        "--quantization fp8",
        Outcome.SERVED,
        "With a checkpoint in FP8, where it can be left out; --dtype is then bfloat16 or float16. Weights that no "
        "kernel takes are dequantised when they are loaded, of any square blocks, and take twice the memory of FP8; "
        "on a CPU all of them in float16, and where the package was installed without a compiler.",
        f"a CPU: {RUN}; a GPU: {READ}",
    ),
    *ON_REQUEST,
    Option(
        "--kv-cache-dtype fp8_e4m3",
        Outcome.SERVED,
        "SGLang's choice on Hopper, fa3, casts the whole cache to the model's dtype in each step, as does flashinfer: "
        "a warning says so. `--decode-attention-backend flashmla` and `triton` read it in FP8. Refused on a CPU.",
        f"{READ}; both ways in a dry run, without a GPU",
    ),
    Option(
        "--enable-single-batch-overlap",
        Outcome.SERVED,
        "The MoE beside the dense path, on a second stream in decoding's graphs; with --moe-a2a-backend deepep tokens "
        "on their way to experts and back, but in graphs in pieces ([more](overlap.md)). Without effect, which is "
        "logged, on a CPU. Off by default, as no GPU has run it.",
        f"{READ}; the order of a layer's operations in the tests, with stand-ins for streams and for DeepEP's kernels; "
        "the second stream in a dry run",
    ),
    Option(
        "--enable-dp-attention",
        Outcome.SERVED,
        "With drafts too. A draft gate is refused with it.",
        f"a CPU: {RUN}, in fp32 and with drafts in chains, by hand in bf16, in FP8, and two pairs of ranks; a GPU: "
        "built and stepped in a dry run, without drafts",
    ),
    *placement.SERVED,
)

UNTRIED: tuple[Option, ...] = (
    Option(
        "--moe-a2a-backend deepep --deepep-mode normal",
        Outcome.UNTRIED,
        "With DeepGEMM's runner, which is taken where none is given. DeepEP sends nothing for an expert of -1.",
        READ,
    ),
    *(
        Option(flag, Outcome.UNTRIED, "", "not tried")
        for flag in (
            *(f"--load-format {way}" for way in ("runai_streamer", "fastsafetensors", "presharded", "remote_instance")),
            *("--disaggregation-mode", "--enable-hierarchical-cache"),
            *("--enable-deterministic-inference", "--enable-memory-saver"),
        )
    ),
)

OPTIONS: tuple[Option, ...] = (
    *SERVED,
    *(rule.option for rule in WRONG),
    *CHECKED_BY_VALUE,
    *(rule.option for rule in OWN),
    *UNTRIED,
)


def refusals(settings: Any, longcat: LongcatConfig, runs_own_class: bool) -> list[str]:
    """What is wrong with any class, and, where SGLang's own does not run, what only that one serves; for `refuse`."""
    rules = WRONG if runs_own_class else (*WRONG, *OWN)
    return [
        f"{rule.option.flag}: {rule.option.why}; {rule.instead and rule.instead + ', or '}leave {rule.option.name} out"
        for rule in rules
        if rule.applies(settings, longcat)
    ]


def reasons_for_own_class(settings: Any, longcat: LongcatConfig) -> list[str]:
    """Why SGLang's own class is to serve it, if that one runs here."""
    return [f"{rule.option.flag}: {rule.option.why}" for rule in OWN if rule.applies(settings, longcat)]
