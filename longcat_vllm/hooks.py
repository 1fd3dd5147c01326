"""Every change of vLLM and transformers, a row each: what, why, and when it can go."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.hooks import Entry, Hook, Stage, Wrapper
from longcat_vllm import cpu_hooks
from longcat_vllm.engine import VLLM

HOOKS: tuple[Hook, ...] = (
    Entry(
        name="model class",
        target="ModelRegistry['LongcatFlashForCausalLM']",
        put="longcat_vllm.registration:register_model",
        found="longcat_vllm.registration:registered_model",
        why="vLLM's own class computes zero experts as expert 0, and does not run on a CPU.",
        remove_when="vLLM's class skips zero experts and runs on a CPU.",
    ),
    Entry(
        name="vLLM's own class",
        target="ModelRegistry['VllmLongcatFlashForCausalLM']",
        put="longcat_vllm.registration:register_own_model",
        found="longcat_vllm.registration:registered_own_model",
        why="Quantisations on a GPU that our class cannot serve are left to vLLM's own class, which needs another "
        "name, as ours has taken its name.",
        remove_when="Our class serves all that vLLM's does.",
    ),
    Entry(
        name="configuration class",
        target="transformers.CONFIG_MAPPING['longcat_flash']",
        put="longcat_vllm.registration:register_config_class",
        found="longcat_vllm.registration:registered_config_class",
        why="transformers 5.19 halves `num_hidden_layers` of a file without `num_layers`, 5.12 takes 28 layers for it, "
        "and both fill in missing sizes with those of the 560 B model.",
        remove_when="transformers' LongcatFlashConfig reads `num_hidden_layers` alone as the number of decoder layers, "
        "and has no default sizes.",
    ),
    Entry(
        name="architecture of 2601",
        target="vllm.transformers_utils.config._ARCHITECTURE_TO_MODEL_TYPE['LongcatCausalLM']",
        put="longcat_vllm.registration:register_architecture",
        found="longcat_vllm.registration:registered_architecture",
        why="LongCat-Flash-Thinking-2601 is reported to be published with this architecture and no `model_type`, and "
        "vLLM does not recognise it.",
        remove_when="vLLM's table has it.",
        upstream="vllm-project/vllm#48302 (open)",
    ),
    Entry(
        name="checkpoint check",
        target="vllm.model_executor.models.config.MODELS_CONFIG_MAP['LongcatFlashForCausalLM']",
        put="longcat_vllm.registration:register_config_check",
        found="longcat_vllm.registration:registered_config_check",
        why="A wrong checkpoint is found by a worker, tens of seconds later, one tensor at a time. The table has no "
        "entry for LongCat-Flash in 0.32 and 0.33, and no public way to add one.",
        remove_when="vLLM has a function that registers a `VerifyAndUpdateConfig`; then call that.",
    ),
    Entry(
        name="draft model class",
        target="ModelRegistry['LongCatFlashMTPModel']",
        put="longcat_vllm.registration:register_draft_model",
        found="longcat_vllm.registration:registered_draft_model",
        why="vLLM's own drafter uses the target's embedding, and sets `n_routed_experts` of the target's "
        "configuration to None.",
        remove_when="It loads the MTP layer's own embedding and leaves the target's configuration alone.",
    ),
    Entry(
        name="tool parser",
        target="ToolParserManager['longcat']",
        put="longcat_vllm.registration:register_tool_parser",
        found="longcat_vllm.registration:registered_tool_parser",
        why="vLLM's parser under this name reads calls in JSON only, and gives those of Flash-Lite, Thinking-2601 and "
        "later as text.",
        remove_when="vLLM's parser reads both forms, and its structural tag has the checkpoint's.",
    ),
    Entry(
        name="reasoning parser",
        target="ReasoningParserManager['longcat']",
        put="longcat_vllm.registration:register_reasoning_parser",
        found="longcat_vllm.registration:registered_reasoning_parser",
        why="vLLM has none for LongCat.",
        remove_when="vLLM has one.",
    ),
    Entry(
        name="chat template",
        target="vllm.transformers_utils.chat_templates.registry._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK['longcat_flash']",
        put="longcat_vllm.registration:register_chat_template",
        found="longcat_vllm.registration:registered_chat_template",
        why="A checkpoint without a chat template cannot be talked to. This is vLLM's table for such.",
        remove_when="vLLM's table has LongCat's templates, by the tokens of a checkpoint.",
    ),
    Wrapper(
        name="prompt of reasoning",
        target="vllm.parser.abstract_parser.Parser.set_prompt_token_ids",
        around="longcat_vllm.chat:hand_on_the_prompt",
        concerns="longcat_vllm.engine:reads_reasoning_of_longcat",
        stage=Stage.PARSER,
        why="A response that is not streamed has its reasoning as content if the prompt has opened it, and gets no "
        "count of its tokens: vLLM gives the prompt to the pair of parsers, which keeps it from the reasoning parser "
        "(`DelegatingParser`).",
        remove_when="`DelegatingParser.set_prompt_token_ids` calls the reasoning parser's "
        "`adjust_initial_state_from_prompt`.",
    ),
    Wrapper(
        name="calls that are cut off",
        target="vllm.entrypoints.anthropic.serving.AnthropicServingMessages.messages_full_converter",
        around="longcat_vllm.chat:leave_out_half_arguments",
        concerns="longcat_vllm.engine:reads_calls_of_longcat",
        stage=Stage.PARSER,
        why="/v1/messages answers 400 instead of all that was generated, if `max_tokens` ends it within a call: vLLM "
        "reads every call's arguments as JSON (entrypoints/anthropic/serving.py:868).",
        remove_when="vLLM answers with what is there, as it does in a stream.",
    ),
    Wrapper(
        name="end of a prompt",
        target="vllm.renderers.hf.HfRenderer.__init__",
        around="longcat_vllm.requests:render_without_an_end",
        concerns="longcat_vllm.engine:configures_longcat",
        stage=Stage.DEPLOYMENT,
        why="A `tokenizer.json` that was saved with LongCat's `add_eos_token` ends every text, and so every prompt of "
        "/v1/completions, with </longcat_s>, unless a request says `add_special_tokens: false`.",
        remove_when="LongCat's tokenizer.json is published without the end in its post-processor.",
    ),
    *cpu_hooks.HOOKS,  # before `draft gate`, which goes around one of the same functions
    Wrapper(
        name="draft gate",
        target="vllm.v1.spec_decode.eagle.EagleProposer.propose",
        around="longcat_vllm.speculation:propose_what_passes",
        concerns="longcat_vllm.engine:drafts_for_longcat",
        stage=Stage.MODEL,
        why="vLLM's proposer for MTP cannot prune drafts that are not worth verifying, and no option names another "
        "proposer.",
        remove_when="A draft model can say how many of its drafts are to be verified.",
    ),
    Wrapper(
        name="start of engines",
        target="vllm.v1.engine.utils.CoreEngineProcManager.__init__",
        around="longcat_vllm.metrics:count_where_statistics_are_logged",
        concerns="longcat_vllm.engine:starts_engines_for_longcat",
        stage=Stage.DEPLOYMENT,
        why="With --disable-log-stats the experts that tokens take are not counted, and no worker learns of that "
        "option: `VllmConfig` does not have it.",
        remove_when="`VllmConfig` has it.",
    ),
    Entry(
        name="target in responses",
        target="vllm.entrypoints.generate.base.serving.GenerateBaseServing.system_fingerprint",
        put="longcat_vllm.registration:register_fingerprint",
        found="longcat_vllm.registration:registered_fingerprint",
        stage=Stage.DIAL,
        why="OpenAI's field for what changes answers is made once, when a server starts, and the dial's target moves.",
        remove_when="vLLM asks the engine for it as a response is finished.",
    ),
    Wrapper(
        name="end of warm-up",
        target="vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model",
        around="longcat_vllm.metrics:begin_when_warm",
        concerns="longcat_vllm.engine:runs_longcat",
        stage=Stage.MODEL,
        device="cuda",
        why="What a worker counts on the device is not among the statistics that vLLM takes from it (`SchedulerStats` "
        "has fixed fields), and cannot be copied from the device while a graph is captured.",
        remove_when="A worker can add statistics of its own.",
    ),
    Wrapper(
        name="end of a weight update",
        target="vllm.model_executor.model_loader.reload.layerwise.finalize_layerwise_processing",
        around="longcat_vllm.updates:finish",
        concerns="longcat_vllm.engine:updates_longcat",
        stage=Stage.MODEL,
        why="An update that lacks an expert, or half of a fused projection, puts uninitialised memory in its place: a "
        "layer that was loaded in part is made anew and copied over the one that runs "
        "(model_executor/model_loader/reload/layerwise.py:273, `_layerwise_process`).",
        remove_when="vLLM puts such a layer's weights back, and says which tensors did not come.",
    ),
    Wrapper(
        name="dial by the queue",
        target="vllm.v1.worker.gpu_worker.Worker.execute_model",
        around="longcat_vllm.dial:follow_queue",
        concerns="longcat_vllm.engine:runs_longcat",
        stage=Stage.MODEL,
        why="A model does not learn how many requests wait, by which a dial between two bounds has its target: what a "
        "scheduler of ours says is in what a worker gets of a step, and goes no further.",
        remove_when="A `ForwardContext` has it, also where a graph is replayed.",
    ),
)


def require_supported(stage: Stage = Stage.PROCESS, device: str = "") -> None:
    """Raise UnsupportedEngineError unless this version of vLLM is supported and our hooks are in place, those of every
    process and of a stage."""
    VLLM.require_supported(HOOKS, stage, device)


def install(stage: Stage) -> None:
    """Called when a LongCat model is about to be served, or is built in this process.

    Raises:
        UnsupportedEngineError: as `require_supported`.
    """
    from vllm.platforms import current_platform

    VLLM.install(HOOKS, stage, current_platform.device_type)
    require_supported(stage, current_platform.device_type)
