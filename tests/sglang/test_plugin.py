"""The plugin is light, re-entrant and harmless to other models, and each of its patches is still needed."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from transformers import LlamaForCausalLM

from longcat_core.plugin.engine import UnsupportedEngineError
from longcat_core.plugin.hooks import guarded
from longcat_sglang import deployment, registration
from longcat_sglang.devices.cpu import platform
from longcat_sglang.devices.cpu.platform import PREPARED, is_server, model_of, read_cores
from longcat_sglang.engine import SGLANG, is_longcat
from longcat_sglang.hooks import HOOKS
from tests.cases import CASES, Case
from tests.plugin import python, save_llama
from tests.sglang.engine import UNSUPPORTED, configure, serving

CASE = CASES["default"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_registering_again_changes_nothing() -> None:
    outcome = python(
        "import json\n"
        "import longcat_sglang\n"
        "from sglang.srt.arg_groups import resolution_hooks\n"
        "from sglang.srt.layers.attention import attention_registry\n"
        "from sglang.srt.plugins import load_plugins\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "load_plugins()\n"
        "def state():\n"
        "    from longcat_sglang.engine import SGLANG\n"
        "    from longcat_sglang.hooks import HOOKS\n"
        "    return [SGLANG.failures, {t: len(h) for t, h in HookRegistry._hooks.items()},\n"
        "            {n: len(h) for n, h in resolution_hooks._HOOKS.items()},\n"
        "            id(attention_registry.ATTENTION_BACKENDS['torch_native'])]\n"
        "before = state()\n"
        "longcat_sglang.register_platform(); longcat_sglang.register(); longcat_sglang.register()\n"
        "HookRegistry.apply_hooks()\n"
        "print(json.dumps([before == state(), before[0]]))"
    )
    assert json.loads(outcome) == [True, {}]


def test_registering_imports_no_model_code() -> None:
    loaded = python(
        "import json, sys\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('longcat_')]))"
    )
    rooms = {name.partition(".")[2] for name in json.loads(loaded)}
    assert "registration" in rooms
    assert rooms.isdisjoint(
        {"model", "moe", "devices.cpu.attention", "reference", "layers.experts", "weights.checkpoint"}
    )


def test_another_model_has_transformers_tokens(llama: Path) -> None:
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 40)]
    model = LlamaForCausalLM.from_pretrained(llama)
    with serving(llama) as served:
        answers = served.greedy(prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, min_new_tokens=12, max_new_tokens=12, pad_token_id=0
        )
        assert answer == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["model class", "attention backend"])
def test_a_hook_that_is_not_in_place_is_an_error_for_longcat_and_for_nothing_else(
    name: str, llama: Path, checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(llama)
    (hook,) = (hook for hook in HOOKS if hook.name == name)
    monkeypatch.setattr(type(hook), "module", lambda self: "none" if self.name == name else "longcat_sglang")
    assert configure(llama) is None
    with pytest.raises(UnsupportedEngineError, match=rf"could not hook into SGLang .*: {name}: none is in its place"):
        configure(checkpoint_of(CASE))


def test_a_hook_that_fails_is_named(checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import longcat_sglang

    def broken() -> None:
        raise ImportError("no such table")

    monkeypatch.setattr(registration, "register_config_check", broken)
    monkeypatch.setattr(SGLANG, "failures", {})
    longcat_sglang.register()
    with pytest.raises(UnsupportedEngineError, match=r"could not hook into SGLang .*checkpoint check.*no such table"):
        configure(checkpoint_of(CASE))


def doubled(original: Callable[[int], int], number: int) -> int:
    return 2 * original(number)


def test_a_hook_into_what_another_plugin_has_hooked_is_put_around_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is registered, and in modules that have imported the function by name. SGLang passes over a target
    that it has applied hooks to."""
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    hooked, importer = ModuleType("hooked"), ModuleType("importer")
    vars(hooked)["function"] = vars(importer)["function"] = lambda number: number
    for module in (hooked, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = guarded("doubled", f"{__name__}:doubled", f"{__name__}:is_any")
    ours.__module__ = "longcat_sglang.doubled"
    HookRegistry.register("hooked.function", lambda original, number: original(number) + 1, HookType.AROUND)
    HookRegistry.apply_hooks()
    assert registration.module_around("hooked.function") == "none"
    for _ in range(2):
        registration.register_around("hooked.function", ours)
        HookRegistry.apply_hooks()
        assert (hooked.function(3), importer.function(3)) == (8, 8)
        assert registration.module_around("hooked.function") == "longcat_sglang.doubled"
    vars(hooked)["function"] = lambda number: number
    assert registration.module_around("hooked.function") == "none"


def is_any(*_: object) -> bool:
    return True


TREE = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3, "speculative_eagle_topk": 3}


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"page_size": 8}, "page_size: 8, wanted 1 on a CPU"),
        ({"pp_size": 2}, "pp_size: 2, wanted 1"),
        ({"tp_size": 3}, "tp_size: 3, wanted a divisor of the 4 heads"),
        ({"attention_backend": "triton"}, "attention_backend: 'triton', wanted none on a CPU"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype: 'fp8_e4m3', wanted 'auto' on a CPU"),
        ({"enable_torch_compile": True}, "torch.compile on a CPU is not supported yet"),
        ({"speculative_algorithm": "EAGLE3"}, "'EAGLE3', wanted NEXTN, which drafts with LongCat's own MTP layer"),
        ({"speculative_algorithm": "NGRAM"}, "NGRAM on a CPU needs sgl_kernel"),
        (
            {"speculative_algorithm": "NEXTN", "speculative_draft_model_path": "/another"},
            "speculative_draft_model_path: '/another', wanted none",
        ),
        (
            {"speculative_algorithm": "NEXTN", "speculative_token_map": "/tokens.pt"},
            "leave --speculative-token-map out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "speculative_draft_model_quantization": "fp8"},
            "leave --speculative-draft-model-quantization out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "enable_multi_layer_eagle": True},
            "leave --enable-multi-layer-eagle out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "speculative_draft_attention_backend": "triton"},
            "speculative_draft_attention_backend: 'triton', wanted none on a CPU",
        ),
        ({"speculative_algorithm": "NEXTN", "speculative_num_draft_tokens": 2}, "give --speculative-num-steps"),
        ({"speculative_algorithm": "NEXTN", "speculative_num_steps": 0}, "speculative_num_steps: 0, wanted 1 or more"),
        ({**TREE, "speculative_num_draft_tokens": 3}, "speculative_num_draft_tokens: 3, wanted 4 to 22"),
        ({**TREE, "speculative_num_draft_tokens": 23}, "speculative_num_draft_tokens: 23, wanted 4 to 22"),
        (
            {"speculative_algorithm": "NEXTN", "speculative_num_steps": 2, "speculative_eagle_topk": 2},
            "give --speculative-num-draft-tokens, or leave --speculative-eagle-topk out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_served_is_named_with_what_to_do(
    option: dict[str, object], wanted: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    with pytest.raises(ValueError, match="cannot be served like this") as refused:
        configure(checkpoint_of(CASE), **option)
    assert wanted in str(refused.value)


def test_flash_lite_stays_sglangs_own() -> None:
    from sglang.srt.configs import LongcatFlashConfig as Stock

    from longcat_sglang.config import LongcatFlashConfig

    config = LongcatFlashConfig.from_dict({"architectures": ["LongcatFlashNgramForCausalLM"], "num_layers": 3})
    assert type(config) is Stock
    assert not is_longcat(config)


def test_quantised_weights_on_a_gpu_are_left_to_sglangs_own_class(
    checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning that says what it lacks, in every process; on a CPU, where it does not run, they are refused."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.models.longcat_flash import LongcatFlashForCausalLM
    from sglang.srt.server_args import ServerArgs

    with pytest.raises(ValueError, match="quantization: 'fp8', wanted none, or "):
        configure(checkpoint_of(CASE), quantization="fp8")
    server_args = ServerArgs(model_path=str(checkpoint_of(CASE)), skip_tokenizer_init=True)
    monkeypatch.setattr(deployment, "_quantization", lambda settings, model_config: "fp8")
    monkeypatch.setattr(deployment, "reasons_for_sglangs_own_class", lambda settings, model_config: ["it is quantised"])
    with caplog.at_level("WARNING"):
        registration._check_after_adjustments(server_args, lambda server_args: None)
    assert "is served by SGLang's own class: it is quantised. It lacks: zero experts scaled" in caplog.text
    of_another_process = ModelConfig.from_server_args(resolving_view(server_args))
    assert not is_longcat(of_another_process.hf_config)
    assert get_model_architecture(of_another_process)[0] is LongcatFlashForCausalLM


# -- a CPU -------------------------------------------------------------------------------------------


UNPREPARED = {name: value for name, value in os.environ.items() if name not in ("SGLANG_USE_CPU_ENGINE", PREPARED)}
"""The environment of a process that none of ours has started."""
IS_PREPARED = (
    "import importlib.util, os, sys\n"
    "print('sgl_kernel' in sys.modules, importlib.util.find_spec('sgl_kernel') is not None,"
    " 'SGLANG_USE_CPU_ENGINE' in os.environ)"
)


def outcome(script: str, *arguments: str | Path, **environment: str) -> str:
    """What a fresh interpreter prints last."""
    command = [sys.executable, "-c", script, *arguments]
    environment = {**UNPREPARED, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_an_installed_sgl_kernel_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel.py").write_text("REAL = True\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    script = "from longcat_sglang.devices.cpu import platform\n"
    script += "platform.prepare_cpu_as_for_longcat(); platform.prepare_cpu()\n"
    assert outcome(script + "import sgl_kernel; print(sgl_kernel.__name__, sgl_kernel.REAL)", PYTHONPATH=path) == (
        "sgl_kernel True"
    )


def started_as(*command: str | Path) -> str:
    """The beginning of a script whose process takes itself for one of this command."""
    return f"import sys; sys.orig_argv = {['python', *map(str, command)]}\nimport sglang\n"


SERVER = ("-m", "sglang.launch_server", "--model-path")


def test_where_there_is_an_accelerator_nothing_is_prepared(checkpoint_of: Callable[[Case], Path]) -> None:
    accelerated = "import torch; torch.accelerator.is_available = lambda: True\n"
    assert outcome(accelerated + started_as(*SERVER, checkpoint_of(CASE)) + IS_PREPARED) == "False False False"


@pytest.mark.parametrize(
    "imports",
    [
        "import sglang",
        "import sglang; sglang.RuntimeEndpoint; sglang.set_default_backend",
        "import sglang.srt.server_args",
        "import sglang.benchmark.serving",
    ],
)
def test_a_process_that_runs_no_engine_is_as_without_the_plugin(imports: str) -> None:
    assert outcome(f"{imports}\n{IS_PREPARED}") == "False False False"


@pytest.mark.parametrize("client", ["sglang.bench_serving", "sglang_router.launch_router"])
def test_a_client_of_a_longcat_is_as_without_the_plugin(client: str, checkpoint_of: Callable[[Case], Path]) -> None:
    assert outcome(started_as("-m", client, "--model", checkpoint_of(CASE)) + IS_PREPARED) == "False False False"


@pytest.mark.parametrize("model", ["a directory", "an-organisation/a-llama"])
def test_a_server_of_another_model_is_as_without_the_plugin(model: str, llama: Path) -> None:
    """Also one that a process which has made an engine has started."""
    script = started_as(*SERVER, llama if model == "a directory" else model)
    for environment in ({}, {PREPARED: "1"}):
        assert outcome(script + IS_PREPARED, **environment) == "False False False"


def test_a_longcats_server_and_what_it_starts_are_prepared(checkpoint_of: Callable[[Case], Path]) -> None:
    assert outcome(started_as(*SERVER, checkpoint_of(CASE)) + IS_PREPARED) == "True True True"
    assert outcome(started_as("-c", "...") + IS_PREPARED, **{PREPARED: "1"}) == "True True True"


def test_a_process_that_makes_an_engine_is_prepared() -> None:
    assert outcome(f"import sglang.srt.entrypoints.engine\n{IS_PREPARED}") == "True True True"


@pytest.mark.parametrize("version", UNSUPPORTED)
def test_where_sglang_is_of_another_version_nothing_is_prepared(
    version: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    of_another_version = (
        "from packaging.version import Version\n"
        "from longcat_core.plugin.engine import Engine\n"
        f"Engine.version = lambda self: Version({version!r})\n"
    )
    for started in (started_as(*SERVER, checkpoint_of(CASE)), "import sglang\n"):
        finders = "import sys; print([each for each in sys.meta_path if type(each).__module__.startswith('longcat_')])"
        assert outcome(of_another_version + started + IS_PREPARED) == "False False False"
        assert outcome(of_another_version + started + finders) == "[]"


def test_the_model_is_found_as_sglang_finds_it(tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("host: 127.0.0.1\nmodel-path: a/b\n")
    serve = ["python", "-m", "sglang.launch_server"]
    assert model_of([*serve, "--host", "127.0.0.1", "--model-path", "a/b"]) == "a/b"
    assert model_of([*serve, "--model-path=a/b", "--port", "1"]) == "a/b"
    assert model_of([*serve, "--config", str(options)]) == "a/b"
    assert model_of([*serve, "--host", "127.0.0.1"]) is None
    options.write_text("# nothing yet\n")
    assert model_of([*serve, "--config", str(options)]) is None
    assert model_of(["/usr/bin/sglang", "serve", "a/b", "--port", "1"]) == "a/b"
    assert model_of(["/usr/bin/sglang", "serve", "--port", "1"]) is None
    assert is_server(serve)
    assert is_server(["python", "/usr/bin/sglang", "serve", "--model-path", "a/b"])
    assert not is_server(["python", "-m", "sglang.bench_serving", "--model", "a/b"])


def test_what_is_no_longcat_is_told_from_one(
    checkpoint_of: Callable[[Case], Path], llama: Path, tmp_path: Path
) -> None:
    assert platform.is_longcat(str(checkpoint_of(CASE)))
    (tmp_path / "config.json").write_text("[]")
    for other in (llama, tmp_path, tmp_path / "nowhere"):
        assert not platform.is_longcat(str(other))
    assert platform.is_longcat("meituan-longcat/LongCat-Flash-Chat"), "which is yet to be downloaded"


@pytest.mark.parametrize(
    ("text", "cores"), [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0-1,8,10-11", {0, 1, 8, 10, 11}), ("5,6", {5, 6})]
)
def test_cores_are_read_as_sglang_writes_them(text: str, cores: set[int]) -> None:
    assert read_cores(text) == cores


# -- what the patches are for is still so ------------------------------------------------------------


def test_sglang_still_does_not_start_on_a_cpu_by_itself() -> None:
    """If this fails, `platform.prepare_cpu` may have become unnecessary."""
    environment = {**UNPREPARED, "SGLANG_USE_CPU_ENGINE": "1"}
    script = "import sglang.srt.managers.scheduler"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode != 0
    assert "sgl_kernel" in done.stderr, done.stderr[-1000:]


def test_sglang_still_takes_transformers_doubled_layers() -> None:
    """If this fails, the hook 'configuration class' may have become unnecessary."""
    from sglang.srt.configs import LongcatFlashConfig as Stock

    assert Stock.from_dict({"num_hidden_layers": 56, "num_layers": 28}).num_hidden_layers == 56


def test_sglang_still_leaves_zero_experts_unscaled() -> None:
    """If this fails, SGLang's own model may have become right (sglang#10019): see the hook 'model class'."""
    from sglang.srt.models.longcat_flash import LongcatFlashMoE

    source = inspect.getsource(LongcatFlashMoE.forward)
    assert source.index("final_hidden_states *= self.routed_scaling_factor") < source.index("+= zero_expert_result")


def test_sglangs_attention_for_cpus_still_has_no_mla() -> None:
    """If this fails, the hook 'attention backend' may have become unnecessary."""
    from sglang.srt.layers.attention import torch_native_backend

    assert "mla" not in inspect.getsource(torch_native_backend).lower()


def test_doctor_finds_nothing_wrong_here_and_what_is_wrong_elsewhere(checkpoint_of: Callable[[Case], Path]) -> None:
    longcat = Path(sys.executable).with_name("longcat")

    def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [longcat, "doctor", checkpoint_of(CASE)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=120,
        )

    well = doctor()
    assert well.returncode == 0, well.stdout
    assert "longcat_sglang.devices.cpu.attention.LatentAttentionBackend" in well.stdout
    ill = doctor(SGLANG_PLUGINS="other")
    assert ill.returncode == 1
    assert "SGLANG_PLUGINS" in ill.stdout
    assert "leaves the plugin out" in ill.stdout
