"""Every change of SGLang, a row each: what, why, and when it can go."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial

from longcat_core.plugin.hooks import Entry, Hook, Stage, Wrapper
from longcat_sglang import cpu_hooks
from longcat_sglang.engine import SGLANG

_Registered = partial(
    Wrapper, wrap="longcat_sglang.registration:register_around", wrapped_by="longcat_sglang.registration:module_around"
)
"""Wrapped through SGLang's own registry of hooks, which installs them after all plugins are loaded. At `Stage.PROCESS`
only functions that can be imported without an accelerator and without `sgl_kernel`."""

HOOKS: tuple[Hook, ...] = (
    _Registered(
        name="model class",
        target="sglang.srt.model_loader.utils.get_model_architecture",
        around="longcat_sglang.registration:our_model_class",
        concerns="longcat_sglang.engine:configures_longcat",
        why="SGLang's own model does not scale zero experts, and computes them as expert 0. Not through "
        "`ModelRegistry.register`, which imports every model in every process, and would give us Flash-Lite too, as "
        "SGLang gives it the same architecture.",
        remove_when="`ModelRegistry` takes a class by name, and Flash-Lite has an architecture of its own.",
        upstream="sgl-project/sglang#10019",
    ),
    Entry(
        name="configuration class",
        target="sglang.srt.utils.hf_transformers.common._CONFIG_REGISTRY['longcat_flash']",
        put="longcat_sglang.registration:register_config_class",
        found="longcat_sglang.registration:registered_config_class",
        why="SGLang takes the `num_hidden_layers` that transformers saves, which is twice the layers, and fills in "
        "missing sizes with those of the 560 B model.",
        remove_when="SGLang's LongcatFlashConfig reads both spellings, and has no default sizes.",
    ),
    Entry(
        name="checkpoint check",
        target="sglang.srt.arg_groups.resolution_hooks['handle_model_specific_adjustments']",
        put="longcat_sglang.registration:register_config_check",
        found="longcat_sglang.registration:registered_config_check",
        why="A wrong checkpoint or deployment is found by a worker, tens of seconds later, if at all. SGLang has these "
        "hooks for plugins.",
        remove_when="Never: these hooks are SGLang's interface for plugins.",
    ),
    Entry(
        name="attention backend",
        target="sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS['torch_native']",
        put="longcat_sglang.registration:register_attention_backend",
        found="longcat_sglang.registration:registered_attention_backend",
        why="On a CPU SGLang's torch_native backend treats MLA's queries as those of plain attention.",
        remove_when="It has MLA, in latent space and for any sizes.",
    ),
    _Registered(
        name="overridden configuration",
        target="sglang.srt.utils.hf_transformers.config.get_config",
        around="longcat_sglang.config:read_again_as_overridden",
        concerns="longcat_sglang.engine:overrides_fields",
        why="SGLang sets the fields of `--json-model-override-args` after the configuration has been read, so that "
        "values derived from them stay as they were.",
        remove_when="SGLang overrides the fields before its configuration class reads them.",
    ),
    Entry(
        name="tool parser",
        target="sglang.srt.function_call.function_call_parser.FunctionCallParser.ToolCallParserEnum['longcat']",
        put="longcat_sglang.registration:register_tool_parser",
        found="longcat_sglang.registration:registered_tool_parser",
        why="SGLang has no parser of LongCat's calls: they stay text. The name goes into the list that the command "
        "line reads (function_call/parser_names.py), the class beside SGLang's when these are imported, which takes "
        "seconds. For any model, on request.",
        remove_when="SGLang has a parser `longcat` for both forms, or an entry point for parsers.",
    ),
    Entry(
        name="reasoning parser",
        target="sglang.srt.parser.reasoning_parser.ReasoningParser.DetectorMap['longcat']",
        put="longcat_sglang.registration:register_reasoning_parser",
        found="longcat_sglang.registration:registered_reasoning_parser",
        why="As tool parser, for reasoning (parser/reasoning_parser_names.py).",
        remove_when="As tool parser.",
    ),
    Entry(
        name="detection of parsers",
        target="sglang.srt.parser.template_detection.TOOL_CALL_PARSER_RULES[0], REASONING_PARSER_RULES[0]",
        put="longcat_sglang.registration:register_detection",
        found="longcat_sglang.registration:registered_detection",
        why="`--tool-call-parser auto` and `--reasoning-parser auto` take Qwen's parsers for a template of LongCat's "
        "that has `enable_thinking`, and none for others.",
        remove_when="As tool parser.",
    ),
    Wrapper(
        name="tags of reasoning",
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._patch_reasoning_skip_special_tokens",
        around="longcat_sglang.registration:keep_tags",
        concerns="longcat_sglang.engine:parses_longcats_reasoning",
        wrap="longcat_sglang.registration:wrap_when_imported",
        wrapped_by="longcat_sglang.registration:module_when_imported",
        why="Where a tokenizer has LongCat's tags as special tokens, SGLang leaves them out of the text of a request "
        "without tools, and reasoning cannot be told from the answer. It keeps them for parsers that it knows by name.",
        remove_when="A detector can say that it needs them.",
    ),
    _Registered(
        name="tokenizer",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.init_tokenizer_and_processor",
        around="longcat_sglang.requests:tokenize_as_prepared",
        concerns="longcat_sglang.engine:tokenizes_for_longcat",
        stage=Stage.DEPLOYMENT,
        why="A `tokenizer.json` that was saved with LongCat's `add_eos_token` ends every text with </longcat_s>: every "
        "prompt of /v1/completions, and a chat whose last message is to be continued. A chat with a checkpoint without "
        "a template is refused. Not in the processes of --tokenizer-worker-num, in which SGLang loads no plugins.",
        remove_when="LongCat's tokenizer.json is published without the end in its post-processor, and SGLang has its "
        "templates.",
    ),
    _Registered(
        name="prompt check of a stream",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        around="longcat_sglang.requests:refuse_a_prompt_outside_the_vocabulary",
        concerns="longcat_sglang.engine:tokenizes_for_longcat",
        stage=Stage.DEPLOYMENT,
        why="As prompt check, which a stream would learn of after its status of 200. Not in the processes of "
        "--tokenizer-worker-num, in which SGLang loads no plugins: there it learns of it in its first event.",
        remove_when="As prompt check.",
    ),
    _Registered(
        name="prompt check",
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        around="longcat_sglang.requests:refuse_what_is_outside_the_vocabulary",
        concerns="longcat_sglang.engine:schedules_longcat",
        stage=Stage.MODEL,
        why="A prompt with a token outside the vocabulary ends the server: SGLang checks the number of tokens only, "
        "and the lookup of such a token's embedding fails in the scheduler (on CUDA, on the device). Hooked here, "
        "where every request passes, whichever process has received it.",
        remove_when="The scheduler checks it where it checks the length.",
    ),
    _Registered(
        name="draft attention",
        target="sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend",
        around="longcat_sglang.devices.cpu.patches:our_drafting_backend",
        concerns="longcat_sglang.engine:drafts_for_longcat",
        why="SGLang has a list of attention backends that can draft, and refuses ours: 'EAGLE is not supported in "
        "decode attention backend torch_native'.",
        remove_when="`DraftBackendFactory` asks the registry of attention backends.",
    ),
    _Registered(
        name="draft attention, extending",
        target="sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend",
        around="longcat_sglang.devices.cpu.patches:no_backend_beside_ours",
        concerns="longcat_sglang.engine:drafts_for_longcat",
        why="As draft attention.",
        remove_when="As draft attention.",
    ),
    Wrapper(
        name="policy of placement",
        target="sglang.srt.eplb.expert_location.ExpertLocationMetadata.init_by_eplb",
        around="longcat_sglang.placement:place_by_load",
        concerns="longcat_sglang.engine:configures_longcat",
        wrap="longcat_sglang.registration:wrap_when_imported",
        wrapped_by="longcat_sglang.registration:module_when_imported",
        why="SGLang's algorithms look at means alone, and move most experts whenever they balance. None can be added.",
        remove_when="A model, or a plugin, can add an algorithm.",
    ),
    *cpu_hooks.HOOKS,  # before `penalties of drafts`, which goes around one of the same functions
    _Registered(
        name="penalties of drafts",
        target="sglang.srt.speculative.eagle_utils.eagle_sample",
        around="longcat_sglang.penalties:transform_at_every_node",
        concerns="longcat_sglang.engine:verifies_longcat",
        stage=Stage.MODEL,
        why="All drafts of a request get the penalties of the token before them ('a relaxed version of penalties'), "
        "and no custom logit processor, with every model. A processor that looks at the request sees it as it was "
        "before the drafts.",
        remove_when="`eagle_sample` penalises a draft for those before it, and applies processors.",
        upstream="sgl-project/sglang#33643, sgl-project/sglang#27769 (open)",
    ),
    Wrapper(
        name="penalties",
        target="sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward",
        around="longcat_sglang.penalties:penalties_of_what_was_generated",
        concerns="longcat_sglang.engine:samples_longcat",
        stage=Stage.MODEL,
        why="Penalties (frequency, presence, repetition, min_new_tokens) count one token a step, however many drafts "
        "are accepted, and are lost when a request is retracted from the cache. With overlapping steps, which is the "
        "default, they also come a token late without drafts, and count the prompt's last token as generated "
        "(`ScheduleBatch.cumulate_penalty_output_tokens`). This is so with every model.",
        remove_when="All tokens are counted before the next is sampled.",
    ),
    Wrapper(
        name="order of steps under penalties",
        target="sglang.srt.managers.scheduler.Scheduler.is_disable_overlap_for_batch",
        around="longcat_sglang.penalties:process_what_is_penalised",
        concerns="longcat_sglang.engine:schedules_longcat",
        stage=Stage.MODEL,
        why="As penalties: with overlapping steps the scheduler does not know the last step's tokens when the next "
        "begins. A batch with penalties waits for them, as one with a grammar does.",
        remove_when="As penalties.",
    ),
    _Registered(
        name="draft gate",
        target="sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker",
        around="longcat_sglang.speculation:gated_worker",
        concerns="longcat_sglang.engine:works_for_longcat",
        why="All drafts are verified, likely to be accepted or not. A worker for an algorithm of our own would need "
        "another flag than the stock one.",
        remove_when="A draft model can say how many of its drafts are to be verified.",
    ),
    _Registered(
        name="refused update",
        target="sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        ".update_weights_from_tensor",
        around="longcat_sglang.updates:say_that_an_update_is_refused",
        concerns="longcat_sglang.engine:updates_longcat",
        why="An update whose tensors are not the model's ends the server: SGLang catches such errors only in updates "
        "from a disk and from another process group.",
        remove_when="`update_weights_from_tensor` answers with what a model's `load_weights` raises.",
    ),
    _Registered(
        name="update from a disk",
        target="sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        ".update_weights_from_disk",
        around="longcat_sglang.updates:read_a_whole_checkpoint",
        concerns="longcat_sglang.engine:updates_longcat",
        why="A checkpoint that does not match ends the server: SGLang's way back to the weights of before reads the "
        "new files again, as `model_path` is changed already (weight_updater.py:186). And a model cannot tell such an "
        "update, which has to be whole, from a part of its weights that a trainer sends.",
        remove_when="SGLang goes back to the files of before, and tells a model that it is given a whole checkpoint.",
    ),
    Wrapper(
        name="slots that drafts reserve",
        target="sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len",
        around="longcat_sglang.requests:count_what_is_reserved",
        concerns="longcat_sglang.engine:is_longcats_process",
        stage=Stage.MODEL,
        why="On a CPU a request that comes near the end of the context ends the server, if there are many drafts: what "
        "a step reserves is counted only for pages of more than one token (mem_cache/allocation_sizing.py). On CUDA "
        "the slots go into the next request's row.",
        remove_when="It is counted for pages of one token too.",
    ),
    Wrapper(
        name="end of warm-up",
        target="sglang.srt.managers.scheduler.Scheduler.run_event_loop",
        around="longcat_sglang.metrics:begin_when_warm",
        concerns="longcat_sglang.engine:schedules_longcat",
        stage=Stage.MODEL,
        why="What a model counts on the device has no place in SGLang's statistics, and cannot be copied from there "
        "while a graph is captured. Here all are.",
        remove_when="A model can add statistics of its own.",
    ),
    Wrapper(
        name="turns of the dial",
        target="sglang.srt.managers.scheduler.Scheduler.set_internal_state",
        around="longcat_sglang.dial:turn_where_asked",
        concerns="longcat_sglang.engine:schedules_longcat",
        stage=Stage.MODEL,
        why="`/set_internal_state` has a fixed list of fields, and refuses those of the dial.",
        remove_when="A model can add fields of its own.",
    ),
    Wrapper(
        name="dial by the queue",
        target="sglang.srt.managers.scheduler.Scheduler.run_batch",
        around="longcat_sglang.dial:follow_queue",
        concerns="longcat_sglang.engine:schedules_longcat",
        stage=Stage.MODEL,
        why="A model does not learn how many requests wait, by which a dial between two bounds has its target.",
        remove_when="A `ForwardBatch` has the length of the queue, also where a graph is replayed.",
    ),
    Wrapper(
        name="target in answers",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        around="longcat_sglang.dial:name_target_of_answers",
        concerns="longcat_sglang.engine:tokenizes_for_longcat",
        stage=Stage.DIAL,
        why="An answer says with which weights it was made, and not under which target of the dial.",
        remove_when="A model can add fields of its own.",
    ),
    Wrapper(
        name="target in responses",
        target="sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        around="longcat_sglang.dial:name_target_of_responses",
        concerns="longcat_sglang.engine:responds_for_longcat",
        stage=Stage.DIAL,
        why="As target in answers, for the routes of OpenAI's interface.",
        remove_when="As target in answers.",
    ),
    Wrapper(
        name="accepted drafts",
        target="sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
        "._resolve_spec_v2_tokens",
        around="longcat_sglang.metrics:note_accepted_drafts",
        concerns="longcat_sglang.engine:resolves_drafts_of_longcat",
        stage=Stage.MODEL,
        why="SGLang's metrics have the mean number of accepted drafts, and not how many are accepted at each position.",
        remove_when="They have it by position.",
    ),
)


def require_supported(stage: Stage = Stage.PROCESS, device: str = "") -> None:
    """Raise UnsupportedEngineError unless this version of SGLang is supported and our hooks are in place, those of
    every process and of a stage; SGLang itself only logs a hook that fails."""
    SGLANG.require_supported(HOOKS, stage, device)


def install(stage: Stage) -> None:
    """Called when a LongCat model is about to be served, or is built in this process; raises as `require_supported`."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.utils import get_device

    device = get_device().partition(":")[0]
    SGLANG.install(HOOKS, stage, device)
    HookRegistry.apply_hooks()  # as SGLang has done with what was registered while it loaded its plugins
    require_supported(stage, device)
