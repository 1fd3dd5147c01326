"""The plugin is light, re-entrant and harmless to other models, and each of its patches is still needed."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from tests.cases import CASES, DEFAULT, write_checkpoint
from tests.plugin import python, save_llama
from tests.vllm.engine import configure, serving


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_register_twice_is_harmless() -> None:
    from longcat_vllm import register
    from longcat_vllm.engine import VLLM

    register()
    register()
    assert VLLM.failures == {}


def test_register_loads_no_model_code() -> None:
    loaded = python(
        "import json, sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('longcat_')]))"
    )
    rooms = {name.partition(".")[2] for name in json.loads(loaded)}
    assert "registration" in rooms
    assert rooms.isdisjoint(
        {
            "model",
            "moe",
            "chat",
            "chat.parser",
            "devices.cpu.attention",
            "reference",
            "layers.experts",
            "weights.checkpoint",
        }
    )


def test_another_model_is_served_as_without_the_plugin(llama: Path) -> None:
    """The same tokens, from the same platform settings and the same attention backend."""
    script = f"""
if __name__ == "__main__":
    import json
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    llm = LLM({str(llama)!r}, dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
              kv_cache_memory_bytes=1 << 24)
    config = llm.llm_engine.vllm_config
    prompts = [{{"prompt_token_ids": list(range(5, 5 + n))}} for n in (1, 9, 40)]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    settings = [config.cache_config.block_size, config.scheduler_config.enable_chunked_prefill,
                config.cache_config.enable_prefix_caching, config.scheduler_config.max_num_batched_tokens]
    print(json.dumps([type(current_platform).__name__, settings, tokens]))
"""
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    assert json.loads(python(script, **in_process)) == json.loads(python(script, VLLM_PLUGINS="", **in_process))


def test_another_platform_plugin_is_activated_as_without_ours(tmp_path: Path) -> None:
    """vLLM takes one at most, and ends over a second, whatever it serves."""
    (tmp_path / "other_platform.py").write_text("def register():\n    return 'vllm.platforms.cpu.CpuPlatform'\n")
    metadata = tmp_path / "other_platform-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nother = other_platform:register\n")
    script = (
        "from vllm.platforms import current_platform\n"
        "from vllm.plugins import PLATFORM_PLUGINS_GROUP, load_plugins_by_group\n"
        "current_platform.device_type\n"
        "print(sorted(load_plugins_by_group(PLATFORM_PLUGINS_GROUP)))"
    )
    assert python(script, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])) == "['other']"


def test_a_hook_that_fails_is_an_error_for_longcat_and_for_nothing_else(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    import longcat_vllm
    from longcat_vllm import registration
    from longcat_vllm.engine import VLLM

    def broken() -> None:
        raise ImportError("no such table")

    monkeypatch.setattr(registration, "register_config_check", broken)
    monkeypatch.setattr(VLLM, "failures", {})
    longcat_vllm.register()
    longcat_vllm.register()
    assert caplog.text.count("could not hook its checkpoint check") == 1
    EngineArgs(str(llama), skip_tokenizer_init=True).create_engine_config()
    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published())
    with pytest.raises(RuntimeError, match=r"could not hook into vLLM .*checkpoint check.*no such table"):
        EngineArgs(str(directory), skip_tokenizer_init=True).create_engine_config()


def test_transformers_still_halves_the_layers_of_a_config_without_num_layers() -> None:
    """If this fails, the hook 'configuration class' may have become unnecessary"""
    layers = python(
        "from transformers import LongcatFlashConfig\n"
        "print(LongcatFlashConfig.from_dict({'num_hidden_layers': 28}).num_layers)"
    )
    assert layers == "14"


def test_vllm_still_has_no_configuration_hook_for_longcat() -> None:
    """If this fails, vLLM has an entry of its own, which the hook 'checkpoint check' must call."""
    present = python(
        "from vllm.model_executor.models.config import MODELS_CONFIG_MAP\n"
        "print('LongcatFlashForCausalLM' in MODELS_CONFIG_MAP)",
        VLLM_PLUGINS="",
    )
    assert present == "False"


def test_vllm_still_turns_chunked_prefill_off_for_mla_on_a_cpu(tmp_path: Path) -> None:
    """If this fails, the hook 'CPU platform settings' may have become unnecessary."""
    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published())
    script = (
        "import json\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"config = EngineArgs({str(directory)!r}, skip_tokenizer_init=True, block_size=8).create_engine_config()\n"
        "print(json.dumps([config.scheduler_config.enable_chunked_prefill,"
        " config.cache_config.enable_prefix_caching, config.cache_config.block_size]))"
    )
    assert json.loads(python(script, VLLM_PLUGINS="")) == [False, False, 16]
    assert json.loads(python(script)) == [True, True, 8]


def test_the_model_that_vllm_builds_is_ours(tmp_path: Path) -> None:
    from longcat_vllm.model import LongcatFlashForCausalLM

    case = CASES["default"]
    with serving(write_checkpoint(tmp_path, case.config, case.published())) as engine:
        assert isinstance(engine.model, LongcatFlashForCausalLM)


def test_quantised_weights_on_a_gpu_are_left_to_vllms_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning that says what that lacks; on a CPU they are refused, as vLLM's class does not run there."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.longcat_flash import LongcatFlashForCausalLM
    from vllm.platforms import current_platform

    from longcat_vllm import deployment
    from longcat_vllm.engine import is_longcat

    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published())
    vllm_config = EngineArgs(str(directory), skip_tokenizer_init=True).create_engine_config()
    model = vllm_config.model_config
    monkeypatch.setattr(model, "quantization", "fp8")
    with pytest.raises(ValueError, match="quantization: 'fp8', wanted none, or the 'fp8' of"):
        deployment.check(vllm_config)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with caplog.at_level("WARNING"):
        deployment.check(vllm_config)
    assert not is_longcat(model)
    built, _ = ModelRegistry.resolve_model_cls(model.hf_config.architectures, model)
    assert built is LongcatFlashForCausalLM


@pytest.mark.parametrize("fields", [{"index_topk": 2048}, {"oe_vocab_size_ratio": 78}])
@pytest.mark.parametrize("architecture", ["LongcatCausalLM", "LongcatFlashForCausalLM"])
def test_another_longcat_under_a_name_of_flash_is_refused(
    architecture: str, fields: dict[str, int], tmp_path: Path
) -> None:
    case = CASES["default"]
    raw = spellings.published(case.config) | fields | {"architectures": [architecture]}
    directory = write_checkpoint(tmp_path, case.config, case.published(), raw)
    with pytest.raises((ValueError, RuntimeError), match=r"with fields of LongCat-.*: wanted LongCat-Flash"):
        configure(directory)


def test_doctor_finds_nothing_wrong_here_and_what_is_wrong_elsewhere(tmp_path: Path) -> None:
    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published())
    longcat = Path(sys.executable).with_name("longcat")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}

    def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [longcat, "doctor", directory],
            capture_output=True,
            text=True,
            env={**inherited, **environment},
            timeout=120,
        )

    well = doctor()
    assert well.returncode == 0, well.stdout
    assert "longcat_vllm.devices.cpu.attention.LatentAttentionBackend" in well.stdout
    ill = doctor(VLLM_PLUGINS="")
    assert ill.returncode == 1
    assert "VLLM_PLUGINS='' leaves the plugin out" in " ".join(ill.stdout.split())


def test_vllms_own_longcat_still_does_not_run_on_a_cpu(tmp_path: Path) -> None:
    """docs/differences.md says so. With the one latent size that vLLM's CPU_MLA takes, it gets as far as the router."""
    case = CASES["latent_512_rope_64"]
    directory = write_checkpoint(tmp_path, case.config, case.published())
    script = f"""
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM({str(directory)!r}, dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
              kv_cache_memory_bytes=1 << 24)
    try:
        llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], SamplingParams(max_tokens=2, detokenize=False))
        print("served")
    except AttributeError as error:
        print(error)
"""
    outcome = python(script, VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    assert "topk_softmax" in outcome


def test_vllms_own_longcat_still_loads_a_checkpoint_that_lacks_an_expert(tmp_path: Path) -> None:
    """docs/differences.md says so; with the plugin it is refused (`test_bad_checkpoints.py`)."""
    case = CASES["latent_512_rope_64"]
    tensors = case.published()
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    directory = write_checkpoint(tmp_path, case.config, tensors)
    script = f"""
if __name__ == "__main__":
    from vllm import LLM
    LLM({str(directory)!r}, dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 24)
    print("loaded")
"""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    assert python(script, VLLM_PLUGINS="", **environment) == "loaded"


@pytest.mark.parametrize("config", [None, DEFAULT])
def test_doctor_asks_vllm_which_implementations_it_would_choose(config: LongcatConfig | None) -> None:
    """What doctor prints on a GPU, asked here of vLLM's CPU platform."""
    from longcat_vllm.devices.cuda.device import engine_choice

    assert engine_choice(config, torch.bfloat16) == ("CPU_MLA", "CPUUnquantizedExperts")
