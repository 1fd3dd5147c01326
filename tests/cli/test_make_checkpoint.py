"""`longcat make-checkpoint`: what it writes, what it refuses, and that it leaves nothing half-made."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

from longcat_cli import example_tokenizer
from longcat_cli.commands import app
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.chat.templates import TEMPLATES, Template, choose
from longcat_core.config import ConfigError, LongcatConfig, RopeConfig
from longcat_core.reference import LongcatForCausalLM
from longcat_core.tokenization import leave_open
from longcat_core.weights import checkpoint, names

CONFIG = LongcatConfig(
    vocab_size=300,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    n_routed_experts=8,
    zero_expert_num=4,
    moe_topk=4,
    max_position_embeddings=256,
    rope=RopeConfig(theta=1e7),
    routed_scaling_factor=6.0,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(directory, CONFIG, seed=0, dtype=torch.bfloat16)
    return directory


@pytest.fixture(scope="module")
def tokenizer(written: Path) -> Any:
    return AutoTokenizer.from_pretrained(written)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_importing_the_command_imports_neither_torch_nor_tokenizers() -> None:
    code = "import sys, longcat_cli; print({'torch', 'tokenizers', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_configuration_reads_back_unchanged(written: Path) -> None:
    assert checkpoint.read_config(written) == CONFIG


def test_the_configuration_is_written_as_the_chat_release_has_it(written: Path) -> None:
    raw = json.loads((written / "config.json").read_text())
    assert "model_type" not in raw
    wanted = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert raw.items() >= {**wanted, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1}.items()
    assert json.loads((written / "generation_config.json").read_text()) == wanted


def test_every_expected_tensor_is_there_and_the_router_is_fp32(written: Path) -> None:
    checkpoint.verify(written, CONFIG)
    tensors = checkpoint.load(written, CONFIG)
    assert tensors.keys() == names.expected_tensors(CONFIG, with_mtp=True).keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name


def test_there_are_several_shards_and_an_index_that_names_them(written: Path) -> None:
    named = set(json.loads((written / checkpoint.INDEX_NAME).read_text())["weight_map"].values())
    assert len(named) > 1
    assert named == {path.name for path in written.glob("*.safetensors")}


def test_without_mtp_there_is_no_mtp_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "plain", CONFIG, seed=0, dtype=torch.float32, with_mtp=False)
    tensors = checkpoint.load(tmp_path / "plain", CONFIG)
    assert not [name for name in tensors if name.startswith(names.MTP_PREFIX)]
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    make_checkpoint(tmp_path / "tied", config, seed=0, dtype=torch.float32)
    assert checkpoint.read_config(tmp_path / "tied") == config
    assert "lm_head.weight" not in checkpoint.load(tmp_path / "tied", config)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_other_weights(written: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "again", CONFIG, seed=0, dtype=torch.bfloat16)
    make_checkpoint(tmp_path / "other", CONFIG, seed=1, dtype=torch.bfloat16)
    assert contents(tmp_path / "again") == contents(written)
    other = checkpoint.load(tmp_path / "other", CONFIG)
    assert not torch.equal(other["lm_head.weight"], checkpoint.load(written, CONFIG)["lm_head.weight"])


def test_logits_are_spread_and_the_router_takes_experts_of_both_kinds(written: Path) -> None:
    model = LongcatForCausalLM.from_checkpoint(written)
    taken: list[torch.Tensor] = []
    for layer in model.model.layers:
        assert layer.mlp.router.e_score_correction_bias.abs().min() > 0
        layer.mlp.router.register_forward_hook(lambda module, inputs, routing: taken.append(routing.ids >= 0))
    with torch.no_grad():
        logits, hidden, _ = model(torch.arange(200).unsqueeze(0))
        drafted, _, _ = model.draft(hidden[:, :-1], torch.arange(1, 200).unsqueeze(0))
    assert 1 < logits.std() < 3
    assert 1 < drafted.std() < 3
    for layer_taken in taken:
        assert 0.3 < layer_taken.float().mean() < 0.95


def test_any_text_survives_the_tokenizer_and_each_special_token_is_one(tokenizer: Any) -> None:
    text = "def café():\n\treturn '龙猫 🐈'\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= CONFIG.vocab_size
    for token in example_tokenizer.SPECIAL_TOKENS + example_tokenizer.MARKERS:
        assert len(tokenizer.encode(token)) == 1, token
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)


def test_decoded_text_keeps_the_markers_that_parsers_look_for(tokenizer: Any) -> None:
    text = "<longcat_think>hm</longcat_think><longcat_tool_call>{}</longcat_tool_call>"
    assert tokenizer.decode(tokenizer.encode(text + "</longcat_s>"), skip_special_tokens=True) == text


def test_one_query_is_rendered_as_documented(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "[Round 0] USER:Hi ASSISTANT:"


def test_rounds_after_a_system_prompt_are_rendered_as_documented(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == ("SYSTEM:Be brief. [Round 0] USER:Hi ASSISTANT:Hello.</longcat_s> [Round 1] USER:Bye ASSISTANT:")


@pytest.mark.parametrize("arguments", [{"place": "Köln"}, '{"place": "Köln"}'], ids=["mapping", "text"])
def test_tool_calls_and_results_stay_within_their_round(tokenizer: Any, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "dry"},
        {"role": "tool", "content": "wet"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written_call = '<longcat_tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</longcat_tool_call>'
    assert prompt == (
        f"[Round 0] USER:Rain? ASSISTANT:{written_call}{written_call}</longcat_s> "
        "TOOL:Tool weather:\ndry</longcat_s> TOOL:Tool weather:\nwet</longcat_s> ASSISTANT:"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_each_template_has_its_tokens_and_a_prompt_gains_no_end(tmp_path: Path, template: Template) -> None:
    make_checkpoint(tmp_path / "tiny", CONFIG, seed=0, dtype=torch.float32, template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert [len(tokenizer.encode(marker)) for marker in template.markers] == [1] * len(template.markers)
    assert choose(tokenizer.get_vocab()).form is template.form
    text = "".join(template.markers)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text

    # As published: the file of the tokenizer ends every text.
    end = TemplateProcessing(single="$A </longcat_s>", special_tokens=[("</longcat_s>", 2)])
    tokenizer._tokenizer.post_processor = end
    assert tokenizer.encode("a")[-1] == 2
    leave_open(tokenizer)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for prompt in (tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)):
        assert 2 not in prompt
        assert tokenizer.decode(prompt) == text


def test_the_command_writes_the_template_that_is_named(tmp_path: Path) -> None:
    sizes = [
        "--hidden-size",
        "64",
        "--vocab-size",
        "276",
        "--layers",
        "1",
        "--routed-experts",
        "4",
        "--zero-experts",
        "2",
    ]
    arguments = ["make-checkpoint", str(tmp_path / "tiny"), *sizes, "--top-k", "2", "--chat-template", "thinking-2601"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tiny/chat_template.jinja").read_text() == TEMPLATES["thinking-2601"].text
    refused = CliRunner().invoke(app, [*arguments[:1], str(tmp_path / "small"), *arguments[2:5], "275", *arguments[6:]])
    assert refused.exit_code == 1
    assert "vocab_size: 275, wanted at least 276" in refused.stderr


def test_a_directory_with_something_in_it_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "thesis.txt").write_text("precious")
    result = CliRunner().invoke(app, ["make-checkpoint", str(directory)])
    assert result.exit_code == 1
    assert str(directory) in result.stderr
    assert contents(directory) == {"thesis.txt": b"precious"}
    assert list(tmp_path.iterdir()) == [directory]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    directory.mkdir()
    result = CliRunner().invoke(app, ["make-checkpoint", str(directory), "--hidden-size", "64", "--vocab-size", "300"])
    assert result.exit_code == 0, result.output
    assert str(directory) in result.stdout
    checkpoint.verify(directory, checkpoint.read_config(directory))
    assert list(tmp_path.iterdir()) == [directory]


def test_bad_sizes_are_refused_with_one_line_a_problem_and_nothing_is_written(tmp_path: Path) -> None:
    sizes = ["--top-k", "25", "--qk-rope-head-dim", "15"]
    result = CliRunner().invoke(app, ["make-checkpoint", str(tmp_path / "bad"), *sizes])
    assert result.exit_code == 1
    problems = [line.strip() for line in result.stderr.splitlines()[1:]]
    assert [problem.split(":")[0] for problem in problems] == ["moe_topk", "qk_rope_head_dim"]
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size: 263, wanted at least 264"):
        make_checkpoint(tmp_path / "bad", dataclasses.replace(CONFIG, vocab_size=263), seed=0, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_the_smallest_vocabulary_is_enough(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=example_tokenizer.MIN_VOCAB_SIZE)
    make_checkpoint(tmp_path / "small", config, seed=0, dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == config.vocab_size


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save", fail)
    result = CliRunner().invoke(app, ["make-checkpoint", str(tmp_path / "failed")])
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert not list(tmp_path.iterdir())
